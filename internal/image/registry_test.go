package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/sirupsen/logrus"
)

const (
	user     = "alice"
	password = "s3cr3t-p4ss"
	token    = "t0k3n-of-the-service"
)

// seen collects the Authorization headers a server was sent.
type seen struct {
	mu      sync.Mutex
	headers []string
	forms   []url.Values
}

func (s *seen) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		if h := r.Header.Get("Authorization"); h != "" {
			s.headers = append(s.headers, h)
		}
		s.mu.Unlock()
		next.ServeHTTP(w, r)
	})
}

func (s *seen) credentials() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.headers...)
}

// pushOnly lets the test push without credentials: what the guard has to say is
// for pulls.
func readsOnly(guard func(http.ResponseWriter, *http.Request) bool) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.UserAgent() == "podshim" && !guard(w, r) {
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func basicGuard(w http.ResponseWriter, r *http.Request) bool {
	if u, p, ok := r.BasicAuth(); ok && u == user && p == password {
		return true
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
	http.Error(w, "who are you", http.StatusUnauthorized)
	return false
}

// tokenService gives token to whoever shows user and password or a refresh token.
func tokenService(t *testing.T) (*httptest.Server, *seen) {
	got := &seen{}
	srv := httptest.NewServer(got.wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		got.mu.Lock()
		got.forms = append(got.forms, r.PostForm)
		got.mu.Unlock()
		u, p, _ := r.BasicAuth()
		ok := (u == user && p == password) ||
			(r.PostForm.Get("username") == user && r.PostForm.Get("password") == password) ||
			r.PostForm.Get("refresh_token") == "identity"
		if !ok {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"token": token, "access_token": token})
	})))
	t.Cleanup(srv.Close)
	return srv, got
}

func tokenGuard(realm string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer "+token {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`",service="test"`)
		http.Error(w, "token please", http.StatusUnauthorized)
		return false
	}
}

func TestAuth(t *testing.T) {
	service, _ := tokenService(t)
	basic := serve(t, readsOnly(basicGuard))
	bearer := serve(t, readsOnly(tokenGuard(service.URL)))
	img := imageOf(t, layerOf(t, file("f", "private")))
	encode := base64.StdEncoding.EncodeToString
	for _, tc := range []struct {
		name string
		srv  server
		auth *Auth
		ok   bool
	}{
		{"basic: user and password", basic, &Auth{Username: user, Password: password}, true},
		{"basic: auth", basic, &Auth{Auth: encode([]byte(user + ":" + password))}, true},
		{"basic: auth without padding", basic, &Auth{Auth: strings.TrimRight(encode([]byte(user+":"+password)), "=")}, true},
		{"basic: server address", basic, &Auth{Username: user, Password: password, ServerAddress: "http://" + basic.host + "/v1/"}, true},
		{"basic: bare server address", basic, &Auth{Username: user, Password: password, ServerAddress: basic.host}, true},
		{"basic: other server's", basic, &Auth{Username: user, Password: password, ServerAddress: "elsewhere.example"}, false},
		{"basic: wrong", basic, &Auth{Username: user, Password: password + "x"}, false},
		{"basic: none", basic, nil, false},
		{"token: user and password", bearer, &Auth{Username: user, Password: password}, true},
		{"token: identity token", bearer, &Auth{IdentityToken: "identity"}, true},
		{"token: helper's identity token", bearer, &Auth{Username: "<token>", Password: "identity"}, true},
		{"token: registry token", bearer, &Auth{RegistryToken: token}, true},
		{"token: wrong registry token", bearer, &Auth{RegistryToken: token + "x"}, false},
		{"token: wrong", bearer, &Auth{Username: user, Password: password + "x"}, false},
		{"token: none", bearer, nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			_, err := s.Pull(context.Background(), tc.srv.push(t, "private:v1", img), tc.auth)
			if tc.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errdefs.IsUnauthorized(err) {
				t.Errorf("got %v", err)
			}
			assertEmpty(t, s)
			assertNoSecret(t, err.Error())
		})
	}
}

func assertNoSecret(t *testing.T, text string) {
	t.Helper()
	for _, s := range []string{password, token, base64.StdEncoding.EncodeToString([]byte(user + ":" + password))} {
		if strings.Contains(text, s) {
			t.Errorf("shows a secret: %s", text)
		}
	}
}

func TestMalformedAuthIsRefusedUnseen(t *testing.T) {
	s := openStore(t)
	for _, auth := range []*Auth{{Auth: "!" + password}, {Auth: base64.StdEncoding.EncodeToString([]byte(password))}, {Username: user, ServerAddress: "http://%zz" + password}} {
		_, err := s.Pull(context.Background(), "127.0.0.1:1/x", auth)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v", err)
		}
		assertNoSecret(t, err.Error())
	}
}

// A registry that repeats what it was sent must not bring it into the error or the
// log.
func TestErrorsAndLogsShowNoCredentials(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) bool {
		if !basicGuard(w, r) {
			return false
		}
		body, _ := json.Marshal(map[string]any{"errors": []any{map[string]string{
			"code": "DENIED", "message": "you sent " + r.Header.Get("Authorization") + " that is " + password}}})
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write(body)
		return false
	}
	var logged bytes.Buffer
	s := openStore(t, func(c *Config) {
		l := logrus.New()
		l.SetOutput(&logged)
		l.SetLevel(logrus.TraceLevel)
		c.Log = logrus.NewEntry(l)
	})
	srv := serve(t, readsOnly(echo))
	_, err := s.Pull(context.Background(), srv.host+"/x:v1", &Auth{Username: user, Password: password})
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("got %v", err)
	}
	assertNoSecret(t, err.Error())
	assertNoSecret(t, logged.String())
	if !strings.Contains(err.Error(), srv.host) || !strings.Contains(err.Error(), "resolve") {
		t.Errorf("says neither host nor step: %v", err)
	}
}

func writeHosts(t *testing.T, dir, host, content string) {
	t.Helper()
	d := filepath.Join(dir, host)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMirrorServesAndGetsNoCredentials(t *testing.T) {
	var mirrorSaw seen
	mirror := serve(t, mirrorSaw.wrap)
	mirror.push(t, "team/app:v1", imageOf(t, layerOf(t, file("f", "mirrored"))))
	certs := t.TempDir()
	writeHosts(t, certs, "registry.invalid", fmt.Sprintf("server = \"https://registry.invalid\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.host))
	s := openStore(t, func(c *Config) { c.HostsDirs = []string{filepath.Join(certs, "missing"), certs} })
	id, err := s.Pull(context.Background(), "registry.invalid/team/app:v1", &Auth{Username: user, Password: password})
	if err != nil {
		t.Fatal(err)
	}
	img, _ := s.Get(id)
	if len(img.RepoTags) != 1 || img.RepoTags[0] != "registry.invalid/team/app:v1" {
		t.Errorf("tags %v", img.RepoTags)
	}
	if c := mirrorSaw.credentials(); len(c) != 0 {
		t.Errorf("mirror was sent %d credentials", len(c))
	}
}

func TestMirrorThatAsksForCredentialsGetsNone(t *testing.T) {
	var mirrorSaw seen
	mirror := serve(t, mirrorSaw.wrap, readsOnly(basicGuard))
	certs := t.TempDir()
	upstream := serve(t, readsOnly(basicGuard))
	ref := upstream.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
	writeHosts(t, certs, strings.ReplaceAll(upstream.host, ":", "_")+"_", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", upstream.host, mirror.host))
	s := openStore(t, func(c *Config) { c.HostsDirs = []string{certs} })
	if _, err := s.Pull(context.Background(), ref, &Auth{Username: user, Password: password}); err != nil {
		t.Error(err)
	}
	if c := mirrorSaw.credentials(); len(c) != 0 {
		t.Errorf("mirror was sent %d credentials", len(c))
	}
}

func TestDeadMirrorFallsBack(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	up := serve(t)
	up.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
	certs := t.TempDir()
	writeHosts(t, certs, "registry.invalid", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", up.host, dead))
	mustPull(t, openStore(t, func(c *Config) { c.HostsDirs = []string{certs} }), "registry.invalid/app:v1")
}

func TestBrokenHostsFileIsAnError(t *testing.T) {
	certs := t.TempDir()
	writeHosts(t, certs, "registry.invalid", "server = ")
	s := openStore(t, func(c *Config) { c.HostsDirs = []string{certs} })
	_, err := s.Pull(context.Background(), "registry.invalid/app:v1", nil)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "hosts.toml") {
		t.Errorf("got %v", err)
	}
}

// tlsProxy puts TLS in front of a registry.
func tlsProxy(t *testing.T, behind server) *httptest.Server {
	u, err := url.Parse(behind.URL)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(httputil.NewSingleHostReverseProxy(u))
	srv.Config.ErrorLog = discardLog
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

func TestTLS(t *testing.T) {
	plain := serve(t)
	plain.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
	secure := tlsProxy(t, plain)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	for name, tc := range map[string]struct {
		hosts string
		ok    bool
	}{
		"known CA":    {fmt.Sprintf("[host.%q]\n  ca = \"ca.pem\"\n", secure.URL), true},
		"skip verify": {fmt.Sprintf("[host.%q]\n  skip_verify = true\n", secure.URL), true},
		"unknown CA":  {fmt.Sprintf("[host.%q]\n", secure.URL), false},
	} {
		t.Run(name, func(t *testing.T) {
			certs := t.TempDir()
			writeHosts(t, certs, "registry.invalid", "server = \""+secure.URL+"\"\n"+tc.hosts)
			if err := os.WriteFile(filepath.Join(certs, "registry.invalid", "ca.pem"), ca, 0o644); err != nil {
				t.Fatal(err)
			}
			s := openStore(t, func(c *Config) { c.HostsDirs = []string{certs} })
			_, err := s.Pull(context.Background(), "registry.invalid/app:v1", nil)
			if tc.ok && err != nil {
				t.Error(err)
			}
			if !tc.ok && (!errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "certificate")) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A registry with TLS that sends its clients to plain HTTP must not get the
// credentials there.
func TestCredentialsStayEncrypted(t *testing.T) {
	var m = newMeter()
	tr := &meteredTransport{meter: m, base: http.DefaultTransport}
	for _, req := range []*http.Request{
		{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "registry.invalid"}, Header: http.Header{"Authorization": {"Basic x"}}},
		{Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: "tokens.invalid"}, Header: http.Header{}},
	} {
		if _, err := tr.RoundTrip(req); !errdefs.IsPermissionDenied(err) {
			t.Errorf("got %v", err)
		}
	}
}

func TestRegistryFailures(t *testing.T) {
	hang := func(w http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		return false
	}
	answer := func(code int, contentType, body string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", contentType)
			sum := sha256.Sum256([]byte(body))
			w.Header().Set("Docker-Content-Digest", "sha256:"+hex.EncodeToString(sum[:]))
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			w.WriteHeader(code)
			if r.Method != http.MethodHead {
				_, _ = io.WriteString(w, body)
			}
			return false
		}
	}
	blobs := func(spoil func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			return !strings.Contains(r.URL.Path, "/blobs/") || spoil(w, r)
		}
	}
	const oci = "application/vnd.oci.image.manifest.v1+json"
	for _, tc := range []struct {
		name  string
		guard func(http.ResponseWriter, *http.Request) bool
		class func(error) bool
		says  string
	}{
		{"hangs", hang, errdefs.IsUnavailable, "RegistryUnavailable: "},
		{"hangs in blobs", blobs(hang), errdefs.IsUnavailable, "RegistryUnavailable: "},
		{"hangs in the middle of a blob", blobs(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", "1000000")
			_, _ = w.Write([]byte("abc"))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return false
		}), errdefs.IsUnavailable, "sent nothing"},
		{"internal error", answer(500, "text/plain", "oops"), errdefs.IsUnavailable, "500"},
		{"overloaded", answer(429, "text/plain", "slow down"), errdefs.IsUnavailable, "429"},
		{"forbids", answer(403, "text/plain", "no"), errdefs.IsPermissionDenied, "403"},
		{"no such image", answer(404, "text/plain", "no"), errdefs.IsNotFound, "resolve"},
		{"no such blob", blobs(answer(404, "text/plain", "no")), errdefs.IsNotFound, "config"},
		{"manifest is HTML", answer(200, "text/html", "<html>sign in</html>"), errdefs.IsDataLoss, "manifest"},
		{"manifest is empty JSON", answer(200, oci, "{}"), errdefs.IsDataLoss, "manifest"},
		{"manifest is null", answer(200, oci, "null"), errdefs.IsDataLoss, "manifest"},
		{"manifest is of schema 1", answer(200, "application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"fsLayers":[]}`), errdefs.IsNotImplemented, "schema 1"},
		{"manifest is index and image", answer(200, oci, `{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}`), errdefs.IsDataLoss, "at once"},
		{"manifest has a bad digest", answer(200, oci, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../x","size":2},"layers":[]}`), errdefs.IsDataLoss, "digest"},
		{"manifest has a negative size", answer(200, oci, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:`+strings.Repeat("a", 64)+`","size":-2},"layers":[]}`), errdefs.IsDataLoss, "size"},
		{"an artifact", answer(200, oci, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"sha256:`+strings.Repeat("a", 64)+`","size":2},"layers":[]}`), errdefs.IsInvalidArgument, "not a container image"},
		{"manifest is huge", answer(200, oci, strings.Repeat(" ", maxManifest+1)), errdefs.IsInvalidArgument, "manifest"},
		{"index for others", answer(200, "application/vnd.oci.image.index.v1+json", `{"schemaVersion":2,"manifests":[{"mediaType":"`+oci+`","digest":"sha256:`+strings.Repeat("a", 64)+`","size":2,"platform":{"os":"plan9","architecture":"mips"}}]}`), errdefs.IsNotFound, "only for plan9/mips"},
		{"blob is cut", blobs(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", "1000000")
			_, _ = w.Write([]byte("abc"))
			panic(http.ErrAbortHandler)
		}), errdefs.IsUnavailable, "config"},
		{"endless manifest", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", oci)
			for r.Context().Err() == nil && r.Method != http.MethodHead {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<16)); err != nil {
					break
				}
			}
			return false
		}, errdefs.IsInvalidArgument, "longer than"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, func(c *Config) { c.NoProgressTimeout = 300 * time.Millisecond })
			srv := serve(t, readsOnly(tc.guard))
			ref := srv.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
			began := time.Now()
			_, err := s.Pull(context.Background(), ref, nil)
			if err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), srv.host) {
				t.Errorf("got %v", err)
			}
			if errdefs.IsUnavailable(err) && !strings.HasPrefix(err.Error(), "RegistryUnavailable: ") {
				t.Errorf("kubelet cannot tell: %v", err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %s", took)
			}
			assertEmpty(t, s)
		})
	}
}

func TestDeadRegistryIsUnavailable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	_, err = openStore(t).Pull(context.Background(), host+"/app:v1", nil)
	if !errdefs.IsUnavailable(err) || !strings.HasPrefix(err.Error(), "RegistryUnavailable: ") || !strings.Contains(err.Error(), host) {
		t.Errorf("got %v", err)
	}
}

// spoiled serves blobs with one byte changed.
func spoiled(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.UserAgent() != "podshim" || !strings.Contains(r.URL.Path, "/blobs/") {
			next.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		if len(body) > 0 {
			body[len(body)-1] ^= 1
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(body)
	})
}

func TestSpoiledBlobIsDataLoss(t *testing.T) {
	s := openStore(t)
	ref := serve(t, spoiled).push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
	if _, err := s.Pull(context.Background(), ref, nil); !errdefs.IsDataLoss(err) {
		t.Errorf("got %v", err)
	}
	assertEmpty(t, s)
}

// A connection that breaks in the middle of a layer is resumed where it broke.
func TestBrokenConnectionIsResumed(t *testing.T) {
	var mu sync.Mutex
	broken := map[string]bool{}
	breakOnce := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			first := r.UserAgent() == "podshim" && strings.Contains(r.URL.Path, "/blobs/") && !broken[r.URL.Path]
			broken[r.URL.Path] = broken[r.URL.Path] || first
			mu.Unlock()
			if r.UserAgent() != "podshim" || !strings.Contains(r.URL.Path, "/blobs/") {
				next.ServeHTTP(w, r)
				return
			}
			ranged := r.Header.Get("Range")
			r.Header.Del("Range") // the registry knows closed ranges only
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, r)
			if !first {
				r.Header.Set("Range", ranged)
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(rec.Body.Bytes()))
				return
			}
			w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
			_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		})
	}
	var h http.Handler = registry.New(registry.Logger(discardLog))
	srv := httptest.NewUnstartedServer(breakOnce(h))
	srv.Config.ErrorLog = discardLog
	srv.Start()
	t.Cleanup(srv.Close)
	u, _ := url.Parse(srv.URL)
	s := openStore(t)
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	img := mustPull(t, s, server{srv, u.Host}.push(t, "app:v1", imageOf(t, layerOf(t, file("f", string(data))))))
	if got := read(t, mounted(t, s, "c", img), "f"); got != string(data) {
		t.Error("content differs")
	}
}

func TestScrub(t *testing.T) {
	in := `Get "https://u:p@cdn.example/blob?X-Sig=abc": secret1 refused`
	if got := scrub(in, []string{"secret1"}); got != `Get "https://cdn.example/blob": [redacted] refused` {
		t.Error(got)
	}
}

func TestPublicErrorHidesItsCause(t *testing.T) {
	err := publicError(context.Background(), fmt.Errorf("x: %w", errdefs.ErrNotFound), nil)
	if !errdefs.IsNotFound(err) || !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("class lost: %v", err)
	}
}
