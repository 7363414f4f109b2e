package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// RegistryHost is the registry's name in image references. The daemon's
// certs.d directory points it at the loopback registry of this test process.
const RegistryHost = "registry.test"

// Busybox is the image nearly every test runs: Debian's busybox with its applets
// as hard links, /etc/passwd with root, www-data (33) and tester (1000, member
// of groups 1000 and 50000), and an empty /data.
const Busybox = RegistryHost + "/busybox:1"

// Registry is a real registry on loopback, one for the whole test process.
type Registry struct {
	// Addr is host:port.
	Addr string
	base layer
}

// layer is a gzipped tar with both of its digests.
type layer struct {
	blob           []byte
	digest, diffID digest.Digest
}

// LoopbackRegistry starts the process's registry at the first call. It lives
// as long as the process and holds its images in memory.
var LoopbackRegistry = sync.OnceValues(startRegistry)

func startRegistry() (*Registry, error) {
	base, err := busyboxLayer()
	if err != nil {
		return nil, fmt.Errorf("build busybox layer: %w", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	go func() { _ = http.Serve(l, handler) }()
	r := &Registry{Addr: l.Addr().String(), base: base}
	if _, err := r.Push("busybox", "1", ImageOptions{}); err != nil {
		return nil, fmt.Errorf("push busybox: %w", err)
	}
	return r, nil
}

// ImageOptions say how an image differs from Busybox.
type ImageOptions struct {
	Config ocispec.ImageConfig
	// Files go into a second layer: path to content; a path that ends in a slash
	// is an empty directory. Mode is 0644, directories 0755, owner root.
	Files map[string]string
}

// Push makes an image on top of busybox and puts it into the registry. It
// returns the digest of its manifest.
func (r *Registry) Push(name, tag string, opts ImageOptions) (digest.Digest, error) {
	layers := []layer{r.base}
	if len(opts.Files) > 0 {
		l, err := packLayer(func(w *tar.Writer) error { return writeFiles(w, opts.Files) })
		if err != nil {
			return "", err
		}
		layers = append(layers, l)
	}
	if len(opts.Config.Env) == 0 {
		opts.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	return r.pushImage(name, tag, opts.Config, layers)
}

func (r *Registry) pushImage(name, tag string, conf ocispec.ImageConfig, layers []layer) (digest.Digest, error) {
	image := ocispec.Image{Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"}, Config: conf}
	image.RootFS.Type = "layers"
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.diffID)
		manifest.Layers = append(manifest.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: l.digest, Size: int64(len(l.blob)),
		})
		if err := r.pushBlob(name, l.blob); err != nil {
			return "", err
		}
	}
	configBlob, err := json.Marshal(image)
	if err != nil {
		return "", err
	}
	if err := r.pushBlob(name, configBlob); err != nil {
		return "", err
	}
	manifest.Config = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(configBlob), Size: int64(len(configBlob)),
	}
	manifestBlob, err := json.Marshal(manifest)
	if err != nil {
		return "", err
	}
	url := fmt.Sprintf("http://%s/v2/%s/manifests/%s", r.Addr, name, tag)
	return digest.FromBytes(manifestBlob), put(http.MethodPut, url, ocispec.MediaTypeImageManifest, manifestBlob)
}

func (r *Registry) pushBlob(name string, blob []byte) error {
	url := fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?digest=%s", r.Addr, name, digest.FromBytes(blob))
	return put(http.MethodPost, url, "application/octet-stream", blob)
}

func put(method, url, contentType string, body []byte) error {
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s", method, url, resp.Status)
	}
	return nil
}

func packLayer(fill func(*tar.Writer) error) (layer, error) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	if err := fill(w); err != nil {
		return layer{}, err
	}
	if err := w.Close(); err != nil {
		return layer{}, err
	}
	var packed bytes.Buffer
	zip, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return layer{}, err
	}
	if _, err := zip.Write(plain.Bytes()); err != nil {
		return layer{}, err
	}
	if err := zip.Close(); err != nil {
		return layer{}, err
	}
	return layer{packed.Bytes(), digest.FromBytes(packed.Bytes()), digest.FromBytes(plain.Bytes())}, nil
}

func writeFiles(w *tar.Writer, files map[string]string) error {
	for name, content := range files {
		var err error
		if strings.HasSuffix(name, "/") {
			err = writeDir(w, name, 0o755)
		} else {
			err = writeFile(w, name, []byte(content), 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeDir(w *tar.Writer, name string, mode int64) error {
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.Trim(name, "/") + "/", Mode: mode})
}

func writeFile(w *tar.Writer, name string, content []byte, mode int64) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: strings.Trim(name, "/"), Mode: mode, Size: int64(len(content))}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

const (
	busyboxPasswd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\ntester:x:1000:1000::/home/tester:/bin/sh\n"
	busyboxGroup  = "root:x:0:\nwww-data:x:33:\ntester:x:1000:\nextra:x:50000:tester\n"
)

// busyboxLayer packs the machine's own busybox (Debian package busybox).
func busyboxLayer() (layer, error) {
	binary, err := exec.LookPath("busybox")
	if err != nil {
		return layer{}, errors.New("busybox is not installed (Debian package busybox)")
	}
	applets, err := exec.Command(binary, "--list").Output()
	if err != nil {
		return layer{}, fmt.Errorf("list applets: %w", err)
	}
	libraries, err := librariesOf(binary)
	if err != nil {
		return layer{}, err
	}
	return packLayer(func(w *tar.Writer) error {
		for _, dir := range []string{"bin", "data", "dev", "etc", "home", "home/tester", "lib", "lib64", "proc", "root", "sys", "var"} {
			if err := writeDir(w, dir, 0o755); err != nil {
				return err
			}
		}
		if err := writeDir(w, "tmp", 0o1777); err != nil {
			return err
		}
		for _, file := range append(libraries, binary) {
			content, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if file == binary {
				file = "bin/busybox"
			}
			if err := writeFile(w, file, content, 0o755); err != nil {
				return err
			}
		}
		for _, name := range strings.Fields(string(applets)) {
			if name == "busybox" {
				continue
			}
			h := &tar.Header{Typeflag: tar.TypeLink, Name: path.Join("bin", name), Linkname: "bin/busybox", Mode: 0o755}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
		}
		return writeFiles(w, map[string]string{"etc/passwd": busyboxPasswd, "etc/group": busyboxGroup})
	})
}

var libraryLine = regexp.MustCompile(`(?m)(?:=> )?(/\S+) \(0x`)

// librariesOf lists the shared libraries a program loads, the loader with them.
func librariesOf(binary string) ([]string, error) {
	out, err := exec.Command("ldd", binary).CombinedOutput()
	if err != nil && !bytes.Contains(out, []byte("not a dynamic executable")) {
		return nil, fmt.Errorf("ldd %s: %w", binary, err)
	}
	var files []string
	for _, m := range libraryLine.FindAllStringSubmatch(string(out), -1) {
		files = append(files, filepath.Clean(m[1]))
	}
	return files, nil
}
