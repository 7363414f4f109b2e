package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/rollback"
)

// Pull fetches the image that ref names and returns its ID. auth may be nil.
//
// A Pull of the same reference with the same credentials joins the one in flight.
// A pull runs to its end even when its caller leaves: the retry finds it done, or
// joins it. On error nothing has changed; layers that only this pull brought are
// removed again.
//
// Errors say the step and the host, and show no credentials. Their classes:
// errdefs.ErrInvalidArgument (the reference, the credentials' form, or what is
// there is no container image), ErrNotFound (no such image, or not for this
// machine), ErrUnauthenticated, ErrPermissionDenied, ErrUnavailable (the registry
// is dead, hangs or has trouble; the message begins with "RegistryUnavailable: "
// for kubelet), ErrDataLoss (a digest is wrong, a manifest is garbage),
// ErrNotImplemented (Docker schema 1, encrypted layers), ErrResourceExhausted
// (the disk is full).
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (id string, err error) {
	named, err := parseReference(ref)
	if err != nil {
		return "", err
	}
	creds, err := newCredentials(auth, reference.Domain(named))
	if err != nil {
		return "", err
	}
	select {
	case <-s.closing:
		return "", fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	default:
	}
	// The key stays in memory, and only while the pull runs.
	key := strings.Join([]string{named.String(), creds.host, creds.username, creds.secret, creds.bearer}, "\x00")
	return flight.Do(ctx, &s.pulls, key, func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithCancelCause(s.quiet(ctx))
		defer cancel(nil)
		id, err := s.pull(ctx, cancel, named, creds)
		if err != nil {
			return "", publicError(ctx, fmt.Errorf("pull %s: %w", named, err), creds.secrets())
		}
		return id, nil
	})
}

// pulled is what a pull has learned of an image before its layers come.
type pulled struct {
	root     digest.Digest // what the name resolved to: an index or the manifest
	manifest []byte
	config   []byte
	image    *ocispec.Image
	id       digest.Digest
	layers   []layer
	size     int64
}

func (s *Store) pull(ctx context.Context, cancel context.CancelCauseFunc, named reference.Named, creds credentials) (id string, err error) {
	began := time.Now()
	m := newMeter()
	guard := make(chan struct{})
	guarded, stop := context.WithCancel(ctx)
	defer func() { stop(); <-guard }()
	go func() {
		defer close(guard)
		m.guard(guarded, s.closing, s.cfg.NoProgressTimeout, cancel)
	}()
	r, err := newRemote(ctx, s.cfg.HostsDirs, named, creds, m)
	if err != nil {
		return "", err
	}
	defer r.close()

	p, err := describe(ctx, r)
	if err != nil {
		return "", err
	}
	unpin := sync.OnceFunc(s.layers.pin(chainsOf(p.layers)))
	defer unpin()
	var undo rollback.Stack
	defer func() { err = undo.Settle(s.quiet(ctx), err) }()
	undo.Push("collect the pull's layers", func(ctx context.Context) error {
		s.freeing.RLock()
		unpin() // what was pinned is to be collected
		return s.collectHeld(ctx)
	})

	if err := s.fetchLayers(ctx, r, p.layers); err != nil {
		return "", err
	}
	if err := s.publishImage(named, p); err != nil {
		return "", err
	}
	s.verifier.keep(p.id.String(), nil)
	s.syncSoon()
	s.log.WithField("image", named.String()).Infof("pulled %s, %d layers, %d bytes, in %s",
		p.id, len(p.layers), p.size, time.Since(began).Round(time.Millisecond))
	return p.id.String(), nil
}

func chainsOf(layers []layer) []digest.Digest {
	chains := make([]digest.Digest, len(layers))
	for i, l := range layers {
		chains[i] = l.chain
	}
	return chains
}

// describe resolves the name and reads manifest and config.
func describe(ctx context.Context, r *remote) (*pulled, error) {
	root, err := r.root(ctx)
	if err != nil {
		return nil, fmt.Errorf("resolve at %s: %w", r.names, err)
	}
	p := &pulled{root: root.Digest}
	machine := platforms.Only(platforms.DefaultSpec())
	if err := p.choose(ctx, r, root, machine, 0); err != nil {
		return nil, err
	}
	return p, nil
}

// choose reads the document desc and follows it to the manifest for this machine.
func (p *pulled) choose(ctx context.Context, r *remote, desc ocispec.Descriptor, machine platforms.MatchComparer, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("index names indexes more than %d deep: %w", maxIndexDepth, errdefs.ErrInvalidArgument)
	}
	data, err := r.read(ctx, desc, maxManifest)
	if err != nil {
		return fmt.Errorf("fetch manifest %s from %s: %w", desc.Digest, r.names, err)
	}
	doc, err := parseDocument(data)
	if err != nil {
		return fmt.Errorf("read manifest %s from %s: %w", desc.Digest, r.names, err)
	}
	if !doc.isIndex() {
		return p.read(ctx, r, data, doc, machine)
	}
	candidates, err := doc.candidates(machine)
	if err != nil {
		return err
	}
	for _, c := range candidates {
		if err = p.choose(ctx, r, c, machine, depth+1); !errdefs.IsNotFound(err) {
			return err
		}
	}
	return err
}

// read fetches and checks the config of a manifest.
func (p *pulled) read(ctx context.Context, r *remote, data []byte, doc *document, machine platforms.Matcher) error {
	config, err := r.read(ctx, *doc.Config, maxConfig)
	if err != nil {
		return fmt.Errorf("fetch config %s from %s: %w", doc.Config.Digest, r.names, err)
	}
	img, err := parseConfig(config)
	if err != nil {
		return fmt.Errorf("read config %s from %s: %w", doc.Config.Digest, r.names, err)
	}
	if err := checkPlatform(img, machine); err != nil {
		return err
	}
	layers, err := layersOf(doc, img)
	if err != nil {
		return fmt.Errorf("read config %s from %s: %w", doc.Config.Digest, r.names, err)
	}
	p.manifest, p.config, p.image, p.id, p.layers = data, config, img, doc.Config.Digest, layers
	p.size = int64(len(data)) + int64(len(config))
	for _, l := range layers {
		p.size += l.desc.Size
	}
	return nil
}

// slots bounds how many layers of one pull are in work.
type slots chan struct{}

// take waits for a slot; the returned function gives it back, once however often
// it is called.
func (s slots) take(ctx context.Context) (release func(), err error) {
	select {
	case s <- struct{}{}:
		return sync.OnceFunc(func() { <-s }), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// fetchLayers brings all layers, a few at a time, the bottom ones first since
// the others are committed on top of them.
func (s *Store) fetchLayers(ctx context.Context, r *remote, layers []layer) error {
	eg, egCtx := errgroup.WithContext(ctx)
	slots := make(slots, s.cfg.MaxConcurrentDownloads)
	commits := newCommitter(egCtx, s)
	defer commits.stop()
	for i, l := range layers {
		release, err := slots.take(egCtx)
		if err != nil {
			break // eg or ctx knows why
		}
		f := &fetch{store: s, remote: r, layer: l, slots: slots, release: release, held: true}
		eg.Go(func() error {
			defer func() { f.release() }()
			if err := f.run(egCtx, i, commits); err != nil {
				return fmt.Errorf("layer %s from %s: %w", l.desc.Digest, r.names, err)
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// fetch is the work on one layer of one pull.
type fetch struct {
	store   *Store
	remote  *remote
	layer   layer
	slots   slots
	release func() // of the slot held, or given back already
	held    bool   // the slot
}

// run returns when layer i is committed, by this pull or by another that has it in
// work. Layers wait for those below them only, so pulls cannot wait for each other
// in a circle as long as nobody waits with a slot in hand.
func (f *fetch) run(ctx context.Context, i int, commits *committer) error {
	for {
		done, other := f.store.layers.begin(f.layer.chain)
		if done != nil {
			defer done()
			break
		}
		f.release()
		f.held = false
		select {
		case <-other: // it is committed, or ours to do
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	has, damaged, err := f.store.hasLayer(ctx, f.layer.chain)
	if err != nil {
		return err
	}
	if has && !damaged {
		return commits.commit(ctx, i, nil)
	}
	st, err := f.stage(ctx)
	if err != nil {
		return err
	}
	if damaged {
		if err := f.store.replaceLayer(ctx, st); err != nil {
			return errors.Join(err, st.drop())
		}
		return commits.commit(ctx, i, nil)
	}
	if err := commits.commit(ctx, i, st); err != nil {
		return errors.Join(err, st.drop())
	}
	return nil
}

// stage downloads and unpacks the layer, in a slot.
func (f *fetch) stage(ctx context.Context) (*staged, error) {
	if !f.held {
		release, err := f.slots.take(ctx)
		if err != nil {
			return nil, err
		}
		f.release = release
	}
	defer f.release()
	blob, err := f.remote.blob(ctx, f.layer.desc)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	return f.store.stage(ctx, f.layer, blob)
}

// publishImage makes the image visible under its names, which it takes from
// whatever image had them.
func (s *Store) publishImage(named reference.Named, p *pulled) error {
	tag, dgst := names(named, p.root)
	s.publish.Lock()
	defer s.publish.Unlock()
	rec := &record{
		ID: p.id.String(), Size: p.size, PulledAt: time.Now().UTC(), config: p.image.Config,
	}
	if len(p.layers) > 0 {
		rec.ChainID = p.layers[len(p.layers)-1].chain
	}
	rec.Unsynced = s.boot
	if old, ok := s.index.get(rec.ID); ok {
		rec.RepoTags, rec.RepoDigests = old.RepoTags, old.RepoDigests
		rec.Unsynced = old.Unsynced // its layers are what they were
	}
	rec.RepoTags, rec.RepoDigests = merge(rec.RepoTags, tag), merge(rec.RepoDigests, dgst)

	losers := map[string]*record{}
	for _, n := range []string{tag, dgst} {
		if owner, ok := s.index.owner(n); ok && owner.ID != rec.ID {
			if known, ok := losers[owner.ID]; ok {
				owner = known
			}
			losers[owner.ID] = owner.without(n)
		}
	}
	var changed []*record
	for _, l := range losers {
		changed = append(changed, l)
	}
	if err := s.records.put(rec, p.config, p.manifest, changed...); err != nil {
		return err
	}
	s.index.set(append(changed, rec)...)
	return nil
}
