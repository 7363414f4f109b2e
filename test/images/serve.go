package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Server is a registry on loopback with every image of a Set. What tests push
// to it is kept in memory and gone with it.
type Server struct {
	// Addr is host:port.
	Addr string

	set  *Set
	http *http.Server
	done chan struct{}
}

// Serve starts a registry on addr ("127.0.0.1:0" picks a port). The caller
// closes it.
func (s *Set) Serve(addr string) (*Server, error) {
	handler := registry.New(
		registry.Logger(log.New(io.Discard, "", 0)),
		registry.WithBlobHandler(&blobs{disk: layout.Path(s.Dir), memory: registry.NewInMemoryBlobHandler()}))
	for _, image := range s.Images {
		if err := publish(handler, layout.Path(s.Dir), image); err != nil {
			return nil, fmt.Errorf("publish %s: %w", image.Name, err)
		}
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for registry: %w", err)
	}
	server := &Server{
		Addr: listener.Addr().String(), set: s,
		http: &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)},
		done: make(chan struct{}),
	}
	go func() {
		defer close(server.done)
		_ = server.http.Serve(listener) // returns once Close was called
	}()
	return server, nil
}

// Close stops the registry and drops the connections it still has.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}

// WriteHosts writes a certs.d directory into dir that sends pulls from every
// registry of the catalogue to this server, in plain HTTP, and nowhere else.
func (s *Server) WriteHosts(dir string) error {
	for host := range s.set.hosts() {
		text := fmt.Sprintf("server = \"http://%[1]s\"\n\n[host.\"http://%[1]s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", s.Addr)
		if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
			return fmt.Errorf("create hosts directory: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644); err != nil {
			return fmt.Errorf("write hosts file: %w", err)
		}
	}
	return nil
}

// hosts are the registries that the catalogue's names are in.
func (s *Set) hosts() map[string]bool {
	hosts := map[string]bool{}
	for _, image := range s.Images {
		host, _, _ := strings.Cut(image.Name, "/")
		hosts[host] = true
	}
	return hosts
}

// publish makes the registry know an image by its repository name, without
// the host: a mirror is asked for /v2/REPOSITORY. The manifests of an index
// go first, the registry refuses the index otherwise.
func publish(handler http.Handler, from layout.Path, image Named) error {
	ref, err := name.NewTag(image.Name, name.StrictValidation)
	if err != nil {
		return err
	}
	if image.MediaType.IsIndex() {
		index, err := from.ImageIndex()
		if err != nil {
			return err
		}
		inner, err := index.ImageIndex(image.Digest)
		if err != nil {
			return err
		}
		manifest, err := inner.IndexManifest()
		if err != nil {
			return err
		}
		for _, d := range manifest.Manifests {
			if err := put(handler, from, ref.RepositoryStr(), d.Digest.String(), d.Digest, d.MediaType); err != nil {
				return err
			}
		}
	}
	return put(handler, from, ref.RepositoryStr(), ref.TagStr(), image.Digest, image.MediaType)
}

// put hands one manifest to the registry's own handler.
func put(handler http.Handler, from layout.Path, repository, reference string, digest v1.Hash, media types.MediaType) error {
	manifest, err := from.Bytes(digest)
	if err != nil {
		return err
	}
	request := httptest.NewRequest(http.MethodPut, "/v2/"+repository+"/manifests/"+reference, bytes.NewReader(manifest))
	request.Header.Set("Content-Type", string(media))
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, request)
	if answer.Code != http.StatusCreated {
		return fmt.Errorf("put manifest %s: status %d: %s", reference, answer.Code, answer.Body)
	}
	return nil
}

// blobs reads from the layout, which must not change, and takes what is
// pushed into memory.
type blobs struct {
	disk   layout.Path
	memory registry.BlobHandler
}

func (b *blobs) path(h v1.Hash) string {
	return filepath.Join(string(b.disk), "blobs", h.Algorithm, h.Hex)
}

// Stat is the size of a blob, registry.ErrNotFound when there is none.
func (b *blobs) Stat(ctx context.Context, repository string, h v1.Hash) (int64, error) {
	if info, err := os.Stat(b.path(h)); err == nil {
		return info.Size(), nil
	}
	if stat, ok := b.memory.(registry.BlobStatHandler); ok {
		return stat.Stat(ctx, repository, h)
	}
	return 0, registry.ErrNotFound
}

// Get opens a blob, registry.ErrNotFound when there is none.
func (b *blobs) Get(ctx context.Context, repository string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(b.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return b.memory.Get(ctx, repository, h)
	}
	return f, err
}

// Put keeps a pushed blob in memory.
func (b *blobs) Put(ctx context.Context, repository string, h v1.Hash, rc io.ReadCloser) error {
	put, ok := b.memory.(registry.BlobPutHandler)
	if !ok {
		return errors.New("registry takes no pushes")
	}
	return put.Put(ctx, repository, h, rc)
}
