package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml/v2"
)

// remote is one pull's side of the registry: its hosts (mirrors first), their
// clients and tokens, and a watch on whether anything still moves.
type remote struct {
	named   reference.Named
	hosts   []docker.RegistryHost
	names   string // of the hosts, for messages
	resolve remotes.Resolver
	fetcher remotes.Fetcher
	meter   *meter
}

// newRemote reads the registry's hosts configuration. Call close when done.
func newRemote(ctx context.Context, dirs []string, named reference.Named, c credentials, m *meter) (*remote, error) {
	opts := config.HostOptions{
		HostDir:      func(host string) (string, error) { return hostDir(dirs, host) },
		Credentials:  c.basic,
		UpdateClient: m.watch,
	}
	registry := reference.Domain(named)
	hosts, err := config.ConfigureHosts(ctx, opts)(registry)
	if err != nil {
		return nil, fmt.Errorf("read hosts configuration of registry %s: %w", registry, err)
	}
	names := make([]string, len(hosts))
	for i := range hosts {
		names[i] = hosts[i].Host
		m.allowPlain(hosts[i])
		if c.bearer != "" {
			hosts[i].Authorizer = bearerAuthorizer{c, hosts[i].Authorizer}
		}
	}
	r := &remote{named: named, hosts: hosts, names: strings.Join(slices.Compact(names), ", "), meter: m}
	r.resolve = docker.NewResolver(docker.ResolverOptions{
		Headers: http.Header{"User-Agent": {"podshim"}},
		Hosts:   func(string) ([]docker.RegistryHost, error) { return hosts, nil },
	})
	if r.fetcher, err = r.resolve.Fetcher(ctx, named.String()); err != nil {
		return nil, fmt.Errorf("image reference %q: %w: %w", named, err, errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// hostDir returns the first directory that configures host. A hosts.toml that
// cannot be read is an error: the library would go on without it, past the
// mirror or the CA that its owner counts on.
func hostDir(dirs []string, host string) (string, error) {
	for _, d := range dirs {
		dir, err := config.HostDirFromRoot(d)(host)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		return dir, checkHostsFile(filepath.Join(dir, "hosts.toml"))
	}
	return "", errdefs.ErrNotFound
}

func checkHostsFile(path string) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // certificates only, as Docker has it
	}
	if err == nil {
		var any map[string]any
		err = toml.Unmarshal(data, &any)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (r *remote) close() { r.meter.closeIdle() }

// root returns the descriptor of what the image's name stands for.
func (r *remote) root(ctx context.Context) (ocispec.Descriptor, error) {
	_, desc, err := r.resolve.Resolve(ctx, r.named.String())
	if err != nil {
		return desc, err
	}
	return desc, checkDescriptors([]ocispec.Descriptor{desc})
}

// read fetches a small blob whole and verifies it. limit is in bytes.
func (r *remote) read(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("%d bytes are more than the %d allowed: %w", desc.Size, limit, errdefs.ErrInvalidArgument)
	}
	body, err := r.blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, desc.Size+1))
	switch {
	case err != nil:
		return nil, err
	case int64(len(data)) != desc.Size:
		return nil, fmt.Errorf("got %d bytes instead of %d: %w", len(data), desc.Size, errdefs.ErrDataLoss)
	case digest.FromBytes(data) != desc.Digest:
		return nil, fmt.Errorf("content has digest %s instead of %s: %w", digest.FromBytes(data), desc.Digest, errdefs.ErrDataLoss)
	}
	return data, nil
}

// blob opens a blob's stream, which resumes where a connection breaks.
func (r *remote) blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	desc.URLs = nil
	return r.fetcher.Fetch(ctx, desc)
}

// errNoProgress is why a pull ends whose registry has gone quiet.
var errNoProgress = errors.New("no progress")

// meter watches a pull's connections: while somebody waits for a registry, bytes
// or answers must come.
type meter struct {
	mu      sync.Mutex
	waiting int       // requests and reads under way
	last    time.Time // something came, or waiting began
	failing string    // host whose last request failed: its retry is no news
	host    string    // asked last, for messages
	plain   map[string]bool
	clients []*http.Client
}

func newMeter() *meter { return &meter{last: time.Now(), plain: map[string]bool{}} }

// watch puts the meter into a client.
func (m *meter) watch(c *http.Client) error {
	base := c.Transport
	if wrapped, ok := base.(*meteredTransport); ok {
		base = wrapped.base // the library copies a client it gave us before
	}
	c.Transport = &meteredTransport{meter: m, base: base}
	m.clients = append(m.clients, c)
	return nil
}

// allowPlain notes a host that the operator configured without TLS.
func (m *meter) allowPlain(h docker.RegistryHost) {
	name, _, err := net.SplitHostPort(h.Host)
	if err != nil {
		name = h.Host
	}
	local, _ := docker.MatchLocalhost(h.Host)
	if h.Scheme == "http" || local {
		m.plain[name] = true
	}
}

func (m *meter) closeIdle() {
	for _, c := range m.clients {
		c.CloseIdleConnections()
	}
}

func (m *meter) requestBegins(host string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting == 0 && m.failing != host {
		m.last = time.Now()
	}
	m.waiting++
	m.host = host
}

func (m *meter) requestEnds(host string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting--
	if err != nil {
		m.failing = host
		return
	}
	m.failing = ""
	m.last = time.Now()
}

func (m *meter) readBegins() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting == 0 {
		m.last = time.Now() // until now the unpacking was what took time
	}
	m.waiting++
}

func (m *meter) readEnds(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting--
	if n > 0 {
		m.last = time.Now()
	}
}

// stalled returns how long nothing has come though somebody waits, and from whom.
func (m *meter) stalled() (time.Duration, string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting == 0 {
		return 0, ""
	}
	return time.Since(m.last), m.host
}

// guard cancels the pull when it stalls for limit, or the store closes. It returns
// when ctx ends.
func (m *meter) guard(ctx context.Context, closing <-chan struct{}, limit time.Duration, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(max(limit/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-closing:
			cancel(fmt.Errorf("image store is closing: %w", context.Canceled))
			return
		case <-tick.C:
		}
		if quiet, host := m.stalled(); quiet > limit {
			cancel(fmt.Errorf("%s sent nothing for %s: %w", host, limit, errNoProgress))
			return
		}
	}
}

// meteredTransport tells the meter what its connections do, and lets no
// credentials out in the clear.
type meteredTransport struct {
	meter *meter
	base  http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (t *meteredTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.checkPlain(req); err != nil {
		return nil, err
	}
	t.meter.requestBegins(req.URL.Host)
	resp, err := t.base.RoundTrip(req)
	t.meter.requestEnds(req.URL.Host, err)
	if err != nil {
		return nil, err
	}
	body := &meteredBody{ReadCloser: resp.Body, meter: t.meter, left: -1}
	if !strings.Contains(firstRequest(req).URL.Path, "/blobs/") {
		body.left = maxManifest
	}
	resp.Body = body
	return resp, nil
}

// firstRequest returns the request that redirects have led to req.
func firstRequest(req *http.Request) *http.Request {
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return req
}

// checkPlain refuses a request with credentials over plain HTTP to a host that is
// not configured so: a redirect or a token service must not bring that about.
func (t *meteredTransport) checkPlain(req *http.Request) error {
	if req.URL.Scheme != "http" || t.meter.plain[req.URL.Hostname()] {
		return nil
	}
	if req.Header.Get("Authorization") == "" && req.Method != http.MethodPost {
		return nil
	}
	return fmt.Errorf("refuse to send credentials to %s without TLS: %w", req.URL.Host, errdefs.ErrPermissionDenied)
}

// CloseIdleConnections lets http.Client.CloseIdleConnections through.
func (t *meteredTransport) CloseIdleConnections() {
	if c, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

type meteredBody struct {
	io.ReadCloser
	meter *meter
	left  int64 // bytes that may come; negative: any number, the descriptor bounds it
}

func (b *meteredBody) Read(p []byte) (int, error) {
	b.meter.readBegins()
	n, err := b.ReadCloser.Read(p)
	b.meter.readEnds(n)
	if b.left < 0 {
		return n, err
	}
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("answer is longer than %d bytes: %w", maxManifest, errdefs.ErrInvalidArgument)
	}
	return n, err
}
