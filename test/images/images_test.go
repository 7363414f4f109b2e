package images

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// built is the catalogue in the repository's artifacts directory, where the
// other tests find it too.
func built(t *testing.T) *Set {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: debootstrap needs root")
	}
	set, err := Build(t.Context(), filepath.Join("..", "..", "_artifacts", "images"))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// TestEveryNameIsServed fetches each image as a runtime does: manifest by tag,
// then whatever it names, by digest.
func TestEveryNameIsServed(t *testing.T) {
	set := built(t)
	server, err := set.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for _, image := range set.Images {
		_, rest, _ := strings.Cut(image.Name, "/")
		repository, tag, _ := strings.Cut(rest, ":")
		base := "http://" + server.Addr + "/v2/" + repository
		manifest, digest := fetch(t, base+"/manifests/"+tag)
		if digest != image.Digest.String() {
			t.Errorf("%s: registry says digest %s, the layout %s", image.Name, digest, image.Digest)
		}
		checkManifest(t, base, manifest)
	}
}

// checkManifest follows an index or a manifest to every blob.
func checkManifest(t *testing.T, base string, manifest []byte) {
	t.Helper()
	var m struct {
		Manifests []v1.Descriptor
		Config    *v1.Descriptor
		Layers    []v1.Descriptor
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatalf("%s: %v", base, err)
	}
	for _, d := range m.Manifests {
		inner, _ := fetch(t, base+"/manifests/"+d.Digest.String())
		checkManifest(t, base, inner)
	}
	if m.Config == nil {
		return
	}
	for _, d := range append(m.Layers, *m.Config) {
		blob, _ := fetch(t, base+"/blobs/"+d.Digest.String())
		if got, size, err := v1.SHA256(bytes.NewReader(blob)); err != nil || got != d.Digest || size != d.Size {
			t.Errorf("%s: blob %s has digest %s and %d bytes, want %d: %v", base, d.Digest, got, size, d.Size, err)
		}
	}
}

func fetch(t *testing.T, url string) (body []byte, digest string) {
	t.Helper()
	answer, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("get %s: status %s: %v: %.200s", url, answer.Status, err, body)
	}
	return body, answer.Header.Get("Docker-Content-Digest")
}

// TestSameNamesSameImage holds what the tag specs rely on.
func TestSameNamesSameImage(t *testing.T) {
	set := built(t)
	for _, names := range [][]string{
		{Pause, "k8s.gcr.io/pause:3.9"},
		{staging("test-image-tags:1"), staging("test-image-tags:2"), staging("test-image-tags:3")},
		{staging("test-image-tag:test"), staging("test-image-tag:all")},
	} {
		for _, name := range names {
			if a, b := digest(t, set, names[0]), digest(t, set, name); a != b {
				t.Errorf("%s is %s, %s is %s, want one image", names[0], a, name, b)
			}
		}
	}
	if a, b := digest(t, set, staging("test-image-1:latest")), digest(t, set, staging("test-image-2:latest")); a == b {
		t.Errorf("test-image-1 and test-image-2 are the same image %s", a)
	}
}

func digest(t *testing.T, set *Set, name string) v1.Hash {
	t.Helper()
	d, err := set.Digest(name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestHosts(t *testing.T) {
	set := built(t)
	server, err := set.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	dir := t.TempDir()
	if err := server.WriteHosts(dir); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"registry.k8s.io", "k8s.gcr.io", "gcr.io"} {
		text, err := os.ReadFile(filepath.Join(dir, host, "hosts.toml"))
		if err != nil || strings.Count(string(text), "http://"+server.Addr) != 2 {
			t.Errorf("hosts.toml of %s: %v:\n%s", host, err, text)
		}
	}
}

// TestReproducible makes everything a second time.
func TestReproducible(t *testing.T) {
	set := built(t)
	d, err := fetchDebian(t.Context(), filepath.Dir(set.Dir))
	if err != nil {
		t.Fatal(err)
	}
	list, err := recipes(t.Context(), d, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if err := write(dir, list); err != nil {
		t.Fatal(err)
	}
	again, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, image := range set.Images {
		if again.Images[i] != image {
			t.Errorf("first %v, then %v", image, again.Images[i])
		}
	}
}

// TestPrograms runs the images' programs, chrooted into what the layers unpack
// to: libraries are complete, configurations valid, links and modes right.
func TestPrograms(t *testing.T) {
	set := built(t)
	root := func(name string) string { return unpack(t, set, name) }
	busybox, nginx, httpd := root(Busybox), root(Nginx), root(Httpd)

	for _, test := range []struct{ root, command, want string }{
		{busybox, "echo $(id -u -n) $(id -G root)", "root 0 10"},
		{busybox, "ipcs -m | head -2 | tail -1", "------ Shared Memory Segments --------"},
		{busybox, "pgrep --version", "pgrep from procps-ng 4.0.2"},
		{busybox, "ls -id /bin/ls /bin/busybox | awk '{print $1}' | uniq | wc -l", "1"},
		{busybox, "stat -c %a /tmp", "1777"},
		{nginx, "grep -c master", "0"},
		{nginx, "readlink /var/log/nginx/access.log", "/dev/stdout"},
		{httpd, "/usr/local/apache2/bin/httpd -t -c 'ErrorLog /tmp/log' 2>&1", "Syntax OK"},
		{unpack(t, set, staging("test-image-predefined-group:latest")), "id -G default-user", "1000 50000"},
	} {
		out, err := chroot(test.root, "/bin/sh", "-c", test.command)
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(out); got != test.want {
			t.Errorf("%s: %q, want %q", test.command, got, test.want)
		}
	}
	for image, text := range map[string]string{
		Nginx: "listen 80;", staging("hostnet-nginx-" + runtime.GOARCH + ":latest"): "listen 12003;",
	} {
		conf, err := os.ReadFile(filepath.Join(root(image), "etc/nginx/conf.d/default.conf"))
		if err != nil || !strings.Contains(string(conf), text) {
			t.Errorf("%s: %v, want %q in:\n%s", image, err, text, conf)
		}
	}
}

// TestNoNewPrivs runs the setuid program as a user, with and without the flag
// that takes its power.
func TestNoNewPrivs(t *testing.T) {
	root := unpack(t, built(t), "registry.k8s.io/e2e-test-images/nonewprivs:1.3")
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "Effective uid: 0\n"},
		{[]string{"--no-new-privs"}, "Effective uid: 1000\n"},
	} {
		args := append([]string{"--reuid=1000", "--regid=1000", "--clear-groups"}, test.args...)
		out, err := exec.Command("setpriv", append(args, filepath.Join(root, "nonewprivs"))...).CombinedOutput()
		if err != nil || string(out) != test.want {
			t.Errorf("setpriv %v: %q, %v, want %q", args, out, err, test.want)
		}
	}
}

// unpack extracts an image's flattened root filesystem.
func unpack(t *testing.T, set *Set, name string) string {
	t.Helper()
	index, err := layout.ImageIndexFromPath(set.Dir)
	if err != nil {
		t.Fatal(err)
	}
	hash := digest(t, set, name)
	for _, image := range set.Images {
		if image.Name != name || !image.MediaType.IsIndex() {
			continue
		}
		inner, err := index.ImageIndex(hash)
		if err != nil {
			t.Fatal(err)
		}
		manifest, err := inner.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		index, hash = inner, manifest.Manifests[len(manifest.Manifests)-1].Digest
	}
	img, err := index.Image(hash)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its parents may not be entered by other users.
	dir, err := os.MkdirTemp("", "podshim-image-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	files := mutate.Extract(img)
	defer files.Close()
	if err := untar(files, dir); err != nil {
		t.Fatalf("unpack %s: %v", name, err)
	}
	return dir
}

// untar is enough for archives made by this package. The parts of a path are
// never symlinks there.
func untar(from io.Reader, dir string) error {
	r := tar.NewReader(from)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		to := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(to, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, to)
		case tar.TypeLink:
			err = os.Link(filepath.Join(dir, h.Linkname), to)
		case tar.TypeReg:
			var f *os.File
			if f, err = os.Create(to); err == nil {
				_, err = io.Copy(f, r)
				err = errors.Join(err, f.Close())
			}
		default:
			err = fmt.Errorf("%s: type %c", h.Name, h.Typeflag)
		}
		if err == nil && h.Typeflag != tar.TypeSymlink {
			err = errors.Join(syscall.Chown(to, h.Uid, h.Gid), syscall.Chmod(to, uint32(h.Mode)))
		}
		if err != nil {
			return err
		}
	}
}

// chroot runs a program of the unpacked image.
func chroot(root string, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Path = args[0]
	cmd.Dir = "/"
	cmd.Env = []string{searchPath}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.Output()
	return string(out), err
}
