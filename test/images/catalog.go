package images

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The names tests use most. All names are in the Set that Build returns.
const (
	Busybox = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
	Nginx   = "registry.k8s.io/e2e-test-images/nginx:1.14-2"
	Httpd   = "registry.k8s.io/e2e-test-images/httpd:2.4.39-4"
	Pause   = "registry.k8s.io/pause:3.9"
	// Etcd serves gRPC's health protocol on its client port.
	Etcd = "registry.k8s.io/etcd:3.5.1-0"
	// Iptables is what kube-proxy's image is built on.
	Iptables = "registry.k8s.io/build-image/distroless-iptables:v0.7.6"
	// DumbInit has nginx under an init of its own.
	DumbInit = "registry.k8s.io/ingress-nginx/controller:v1.12.1"
)

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// recipe is one image before it is made: its layers from the lowest, its
// configuration, every name it goes by, and whether it is served behind an
// index (a manifest list), as multi-platform images are.
type recipe struct {
	names  []string
	layers []tree
	config v1.Config
	index  bool
}

// recipes lists every image of the catalogue. work is for files that have to
// be compiled first.
func recipes(ctx context.Context, d *debian, work string) ([]recipe, error) {
	busybox, err := busyboxTree(ctx, d)
	if err != nil {
		return nil, err
	}
	nginx, err := nginxTree(d, busybox)
	if err != nil {
		return nil, err
	}
	httpd, err := httpdTree(d, busybox)
	if err != nil {
		return nil, err
	}
	etcd, err := etcdTree(d, busybox)
	if err != nil {
		return nil, err
	}
	iptables, err := iptablesTree(d, busybox)
	if err != nil {
		return nil, err
	}
	dumbInit := tree{}
	if err := dumbInit.binaries(d, []tree{busybox, nginx}, "/usr/bin/dumb-init"); err != nil {
		return nil, fmt.Errorf("dumb-init image: %w", err)
	}
	pause, err := compiled(ctx, work, "pause", 0o755)
	if err != nil {
		return nil, err
	}
	setuid, err := compiled(ctx, work, "nonewprivs", 0o4755)
	if err != nil {
		return nil, err
	}

	shell := v1.Config{Env: []string{searchPath}, Cmd: []string{"sh"}}
	web := v1.Config{
		Env:          []string{searchPath},
		Cmd:          []string{"nginx", "-g", "daemon off;"},
		ExposedPorts: map[string]struct{}{"80/tcp": {}},
		StopSignal:   "SIGTERM",
	}
	list := []recipe{
		{names: []string{Busybox}, layers: []tree{busybox}, config: shell, index: true},
		{names: []string{Nginx}, layers: []tree{busybox, nginx}, config: web, index: true},
		{names: []string{Httpd}, layers: []tree{busybox, httpd}, index: true, config: v1.Config{
			Env:          []string{"PATH=/usr/local/apache2/bin:" + searchPath[len("PATH="):]},
			Cmd:          []string{"httpd", "-D", "FOREGROUND"},
			WorkingDir:   "/usr/local/apache2",
			ExposedPorts: map[string]struct{}{"80/tcp": {}},
			StopSignal:   "SIGWINCH",
		}},
		{names: []string{Pause, "k8s.gcr.io/pause:3.9"}, layers: []tree{pause}, index: true, config: v1.Config{
			Env: []string{searchPath}, Entrypoint: []string{"/pause"}, User: "65535:65535", WorkingDir: "/",
		}},
		{names: []string{Etcd}, layers: []tree{busybox, etcd}, config: shell, index: true},
		{names: []string{Iptables}, layers: []tree{busybox, iptables}, config: shell, index: true},
		{names: []string{DumbInit}, layers: []tree{busybox, nginx, dumbInit}, index: true, config: v1.Config{
			Env: []string{searchPath}, Entrypoint: []string{"/usr/bin/dumb-init", "--"}, Cmd: web.Cmd,
		}},
		{names: []string{"registry.k8s.io/e2e-test-images/nonewprivs:1.3"}, layers: []tree{setuid}, index: true,
			config: v1.Config{Env: []string{searchPath}, Entrypoint: []string{"/nonewprivs"}}},
		{names: []string{staging("hostnet-nginx-" + runtime.GOARCH + ":latest")}, config: web,
			layers: []tree{busybox, nginx, tree{}.with("/etc/nginx/conf.d/default.conf", nginxServer(12003))}},
	}
	return append(list, stagingRecipes(busybox, shell)...), nil
}

// staging is the full name of one of cri-tools' own test images.
func staging(name string) string { return "gcr.io/k8s-staging-cri-tools/" + name }

// stagingRecipes are the images that differ from busybox in a marker file or
// in their user only.
func stagingRecipes(busybox tree, shell v1.Config) []recipe {
	marked := func(marker string, names ...string) recipe {
		return recipe{names: names, config: shell, layers: []tree{busybox, tree{}.with("/"+marker, "")}}
	}
	list := []recipe{
		marked("test-image-1", staging("test-image-1:latest")),
		marked("test-image-2", staging("test-image-2:latest")),
		marked("test-image-3", staging("test-image-3:latest")),
		marked("test-image-latest", staging("test-image-latest:latest")),
		marked("test-image-digest", staging("test-image-digest:latest")),
		marked("same-image", staging("test-image-tags:1"), staging("test-image-tags:2"), staging("test-image-tags:3")),
		marked("test-image-tag", staging("test-image-tag:test"), staging("test-image-tag:all")),
	}
	users := map[string]string{
		"test-image-user-uid":            "1002",
		"test-image-user-username":       "www-data",
		"test-image-user-uid-group":      "1003:1004",
		"test-image-user-username-group": "www-data:1004",
	}
	for _, name := range slices.Sorted(maps.Keys(users)) {
		config := shell
		config.User = users[name]
		list = append(list, recipe{names: []string{staging(name + ":latest")}, layers: []tree{busybox}, config: config})
	}
	grouped := tree{}.
		with("/etc/passwd", passwd+"default-user:x:1000:1000::/home/default-user:/bin/sh\n").
		with("/etc/group", group+"default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	config := shell
	config.User = "1000"
	return append(list, recipe{
		names:  []string{staging("test-image-predefined-group:latest")},
		layers: []tree{busybox, grouped}, config: config,
	})
}

// with adds a text file, for trees written in one expression.
func (t tree) with(name, body string) tree {
	t.text(name, body)
	return t
}

// Accounts of all images. Critest looks up nobody and www-data by name; the
// wheel line gives root a supplementary group, which the group specs want to
// see merged.
const (
	passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
sync:x:4:100:sync:/bin:/bin/sync
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nginx:x:101:101:nginx:/nonexistent:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
`
	group = `root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
wheel:x:10:root
www-data:x:33:
operator:x:37:
users:x:100:
nginx:x:101:
nogroup:x:65534:
`
)

// busyboxTree is the base of nearly every image. The applets are hard links
// and not symlinks: the masked-path spec hides /bin/ls and nothing else.
// ipcs and pgrep are not in Debian's busybox.
func busyboxTree(ctx context.Context, d *debian) (tree, error) {
	t := tree{}
	for name, mode := range map[string]int64{
		"/dev": 0o755, "/etc": 0o755, "/home": 0o755, "/proc": 0o555, "/root": 0o700, "/run": 0o755, "/sys": 0o555,
		"/tmp": 0o1777, "/usr/sbin": 0o755, "/var/run": 0o755, "/var/tmp": 0o1777, "/var/www": 0o755,
	} {
		t.dir(name, mode)
	}
	t.text("/etc/passwd", passwd)
	t.text("/etc/group", group)
	t.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
	if err := t.binaries(d, nil, "/bin/busybox", "/usr/bin/ipcs", "/usr/bin/pgrep"); err != nil {
		return nil, fmt.Errorf("busybox image: %w", err)
	}
	applets, err := d.applets(ctx)
	if err != nil {
		return nil, fmt.Errorf("busybox image: %w", err)
	}
	for _, applet := range applets {
		t.hardlink(filepath.Join("/bin", applet), "/bin/busybox")
	}
	return t, nil
}

// nginxTree is nginx on top of busybox, whose grep (first in PATH, there is
// no other) takes the NUL bytes of /proc/1/cmdline for text.
func nginxTree(d *debian, base tree) (tree, error) {
	t := tree{}
	if err := t.binaries(d, []tree{base}, "/usr/sbin/nginx"); err != nil {
		return nil, fmt.Errorf("nginx image: %w", err)
	}
	types, err := d.read("/etc/nginx/mime.types")
	if err != nil {
		return nil, fmt.Errorf("nginx image: %w", err)
	}
	t.file("/etc/nginx/mime.types", 0o644, types)
	t.text("/etc/nginx/nginx.conf", `user nginx;
worker_processes 1;
error_log /var/log/nginx/error.log warn;
pid /var/run/nginx.pid;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log /var/log/nginx/access.log combined;
    sendfile on;
    include /etc/nginx/conf.d/*.conf;
}
`)
	t.text("/etc/nginx/conf.d/default.conf", nginxServer(80))
	t.text("/usr/share/nginx/html/index.html", page("Welcome to nginx!"))
	// The container's log is the server's log.
	t.symlink("/var/log/nginx/access.log", "/dev/stdout")
	t.symlink("/var/log/nginx/error.log", "/dev/stderr")
	t.dirOf("/var/lib/nginx", 0o755, 101, 101)
	return t, nil
}

func nginxServer(port int) string {
	return fmt.Sprintf(`server {
    listen %d;
    server_name localhost;
    location / {
        root /usr/share/nginx/html;
        index index.html;
    }
}
`, port)
}

func page(title string) string {
	return "<!DOCTYPE html>\n<html><head><title>" + title + "</title></head><body><h1>" + title + "</h1></body></html>\n"
}

// httpdTree is Apache on top of busybox, under the name and at the place
// where the httpd image has it: at start it logs its command line, and the
// log spec looks for the word httpd there.
func httpdTree(d *debian, base tree) (tree, error) {
	modules := []string{"mpm_event", "authz_core", "dir", "mime"}
	// pthread_exit, by which the thread ends that starts those of each child, loads libgcc_s by name.
	libgcc, err := d.library("libgcc_s.so.1")
	if err != nil {
		return nil, fmt.Errorf("httpd image: %w", err)
	}
	programs := []string{"/usr/sbin/apache2", libgcc}
	config := `ServerRoot /usr/local/apache2
ServerName localhost
Listen 80
PidFile /var/run/httpd.pid
User www-data
Group www-data
DocumentRoot /usr/local/apache2/htdocs
ErrorLog /proc/self/fd/2
LogLevel notice
TypesConfig /usr/local/apache2/conf/mime.types
DirectoryIndex index.html
`
	for _, module := range modules {
		at := "/usr/lib/apache2/modules/mod_" + module + ".so"
		programs = append(programs, at)
		config = "LoadModule " + module + "_module " + at + "\n" + config
	}
	t := tree{}
	if err := t.binaries(d, []tree{base}, programs...); err != nil {
		return nil, fmt.Errorf("httpd image: %w", err)
	}
	t.hardlink("/usr/local/apache2/bin/httpd", "/usr/sbin/apache2")
	t.text("/etc/apache2/apache2.conf", config) // the path compiled into Debian's Apache
	t.text("/usr/local/apache2/conf/mime.types", "text/html html\ntext/plain txt\n")
	t.text("/usr/local/apache2/htdocs/index.html", page("It works!"))
	return t, nil
}

// etcdTree is etcd where its own image has it.
func etcdTree(d *debian, base tree) (tree, error) {
	t := tree{}
	if err := t.binaries(d, []tree{base}, "/usr/bin/etcd"); err != nil {
		return nil, fmt.Errorf("etcd image: %w", err)
	}
	t.symlink("/usr/local/bin/etcd", "/usr/bin/etcd")
	return t, nil
}

// iptablesTree is iptables on nftables. Its matches and targets are libraries that it
// opens by name when a rule needs them.
func iptablesTree(d *debian, base tree) (tree, error) {
	t := tree{}
	programs := []string{"/usr/sbin/xtables-nft-multi"}
	dir, err := d.path("/usr/lib")
	if err != nil {
		return nil, fmt.Errorf("iptables image: %w", err)
	}
	extensions, err := filepath.Glob(dir + "/*-linux-gnu*/xtables/*.so")
	if err != nil || len(extensions) == 0 {
		return nil, fmt.Errorf("iptables image: no extensions below %s: %w", dir, err)
	}
	for _, extension := range extensions {
		programs = append(programs, strings.TrimPrefix(extension, d.root))
	}
	if err := t.binaries(d, []tree{base}, programs...); err != nil {
		return nil, fmt.Errorf("iptables image: %w", err)
	}
	for _, name := range []string{"iptables", "iptables-save", "ip6tables", "ip6tables-save"} {
		t.symlink("/usr/sbin/"+name, "xtables-nft-multi")
	}
	return t, nil
}

// compiled is a layer of one static program, made from src/NAME.c.
func compiled(ctx context.Context, work, name string, mode int64) (tree, error) {
	source, err := sources.ReadFile("src/" + name + ".c")
	if err != nil {
		return nil, fmt.Errorf("source of %s: %w", name, err)
	}
	in, out := filepath.Join(work, name+".c"), filepath.Join(work, name)
	if err := os.WriteFile(in, source, 0o644); err != nil {
		return nil, fmt.Errorf("source of %s: %w", name, err)
	}
	cc := exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wall", "-Werror", "-o", out, in)
	cc.Dir = work
	if text, err := cc.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile %s: %w: %s", name, err, tail(text))
	}
	body, err := os.ReadFile(out)
	if err != nil {
		return nil, fmt.Errorf("compile %s: %w", name, err)
	}
	t := tree{}
	t.file("/"+name, mode, body)
	return t, nil
}

// image makes the recipe's image, and behind which descriptor it is served.
// Images of cri-tools' own registry are Docker schema 2, the others OCI, so
// that pulls meet both.
func (r recipe) image(made map[string]v1.Layer) (v1.Image, error) {
	manifest, configType, layerType := types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayer
	if !r.index {
		manifest, configType, layerType = types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerLayer
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, manifest), configType)
	var adds []mutate.Addendum
	for _, t := range r.layers {
		key := fmt.Sprintf("%p %s", t, layerType)
		if made[key] == nil {
			layer, err := t.layer(layerType)
			if err != nil {
				return nil, err
			}
			made[key] = layer
		}
		adds = append(adds, mutate.Addendum{
			Layer: made[key], MediaType: layerType,
			History: v1.History{CreatedBy: "podshim test/images", Created: v1.Time{Time: epoch}},
		})
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS = runtime.GOARCH, "linux"
	file.Created = v1.Time{Time: epoch}
	file.Config = r.config
	return mutate.ConfigFile(img, file)
}
