package config

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

var update = flag.Bool("update", false, "write docs/config.md anew")

// fields lists the TOML names of all fields of a struct type, tables by prefix;
// maps (tables with free names) are left out.
func fields(t reflect.Type, prefix string) []string {
	var names []string
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		switch {
		case f.Type == reflect.TypeFor[Duration]():
			names = append(names, prefix+name)
		case f.Type.Kind() == reflect.Struct:
			names = append(names, fields(f.Type, prefix+name+".")...)
		case f.Type.Kind() == reflect.Map:
		default:
			names = append(names, prefix+name)
		}
	}
	return names
}

func TestEveryKeyIsDocumentedOnce(t *testing.T) {
	want := fields(reflect.TypeFor[Config](), "")
	var got []string
	for _, k := range Keys() {
		got = append(got, k.Name)
		if k.Doc == "" || !strings.HasSuffix(k.Doc, ".") {
			t.Errorf("%s: documentation %q is not a sentence", k.Name, k.Doc)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("default.toml has\n%q, Config\n%q", got, want)
	}
}

func TestKeysHaveTheDefaultThatIsDecoded(t *testing.T) {
	var whole map[string]any
	if err := toml.Unmarshal(defaultFile, &whole); err != nil {
		t.Fatal(err)
	}
	for _, k := range Keys() {
		var one map[string]any
		if err := toml.Unmarshal([]byte("v = "+k.Default), &one); err != nil {
			t.Errorf("%s: default %q: %v", k.Name, k.Default, err)
			continue
		}
		var want any = whole
		for part := range strings.SplitSeq(k.Name, ".") {
			want = want.(map[string]any)[part]
		}
		if !reflect.DeepEqual(one["v"], want) {
			t.Errorf("%s: documented default %v, decoded %v", k.Name, one["v"], want)
		}
	}
}

func TestDefaultIsValid(t *testing.T) {
	if err := Default().Complete(); err != nil {
		t.Fatal(err)
	}
}

// The commented handler of default.toml must work when its marks are taken away.
func TestHandlerExample(t *testing.T) {
	text := string(defaultFile)
	i := strings.Index(text, "# [runtime.handlers.")
	if i < 0 {
		t.Fatal("default.toml shows no handler")
	}
	text = text[:i] + strings.ReplaceAll(text[i:], "# ", "")
	cfg, err := load(t, text)
	if err != nil {
		t.Fatal(err)
	}
	got, ok := cfg.Runtime.Handler("many-files")
	if !ok || got.NofileSoft != 65536 || got.NofileHard != cfg.Runtime.NofileHard {
		t.Errorf("handler many-files: %v %+v", ok, got)
	}
}

func TestDocsAreRendered(t *testing.T) {
	const path, mark = "../../docs/config.md", "<!-- the rest is rendered from internal/config/default.toml: go test ./internal/config -update -->\n"
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := bytes.Cut(have, []byte(mark))
	if !ok {
		t.Fatalf("%s has no line %q", path, mark)
	}
	if *update {
		whole := slices.Concat(head, []byte(mark), Markdown())
		if err := os.WriteFile(path, whole, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !bytes.Equal(rest, Markdown()) {
		t.Errorf("%s is not what default.toml says: run go test ./internal/config -update", path)
	}
}

// load writes text to a file, loads and completes it.
func load(t *testing.T, text string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(path, true)
	if err != nil {
		return nil, err
	}
	return cfg, cfg.Complete()
}

func TestLoadRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       []string // parts of the message
	}{
		{"unknown key", "root = \"/a\"\n\n[cri]\nsockte = \"/b\"\n", []string{"config.toml:4:1: unknown key cri.sockte"}},
		{"two unknown keys", "rooot = 1\n[log]\nlevel = \"info\"\nx.y = 2\n", []string{":1:1: unknown key rooot", ":4:1: unknown key log.x.y"}},
		{"unknown table", "[crio]\na = 1\n", []string{":1:2: unknown key crio"}},
		{"unknown key of a handler", "[runtime.handlers.a]\nnofile = 1\n", []string{":2:1: unknown key runtime.handlers.a.nofile"}},
		{"number for a string", "[log]\nlevel = 3\n", []string{"config.toml:2:", "log.level"}},
		{"string for a number", "[cri]\n\nstream_port = \"80\"\n", []string{"config.toml:3:15: cri.stream_port: wrong type: string"}},
		{"string for a list", "[network]\nbin_dirs = \"/a\"\n", []string{"config.toml:2:", "network.bin_dirs"}},
		{"no duration", "[cri]\nstream_idle_timeout = \"soon\"\n", []string{"config.toml:2:", "cri.stream_idle_timeout", `"soon" is not a time`}},
		{"negative limit", "[runtime]\nnofile_soft = -1\n", []string{"config.toml:2:", "runtime.nofile_soft"}},
		{"bad syntax", "root = \n", []string{"config.toml:1:"}},
		{"key twice", "root = \"/a\"\nroot = \"/b\"\n", []string{"config.toml:2:"}},

		{"relative root", `root = "a"`, []string{`root: "a" is not an absolute path`}},
		{"root within run", "root = \"/x/y\"\nrun = \"/x\"", []string{"run: "}},
		{"root is slash", `root = "/"`, []string{"root: "}},
		{"long socket", "[cri]\nsocket = \"/" + strings.Repeat("a", 107) + "\"", []string{"cri.socket: "}},
		{"level", "[log]\nlevel = \"loud\"", []string{`log.level: "loud"`}},
		{"panic is no level", "[log]\nlevel = \"panic\"", []string{"log.level: "}},
		{"format", "[log]\nformat = \"xml\"", []string{`log.format: "xml"`}},
		{"metrics address", "[metrics]\naddress = \"localhost:1\"", []string{"metrics.address: "}},
		{"stream address", "[cri]\nstream_address = \"localhost\"", []string{"cri.stream_address: "}},
		{"stream port", "[cri]\nstream_port = 65536", []string{"cri.stream_port: 65536"}},
		{"idle timeout", "[cri]\nstream_idle_timeout = \"0s\"", []string{"cri.stream_idle_timeout: "}},
		{"message size", "[cri]\nmax_message_size = 10", []string{"cri.max_message_size: 10"}},
		{"exec output above the message", "[cri]\nexec_sync_output_limit = 16777216", []string{"cri.exec_sync_output_limit: 16777216"}},
		{"driver", "[cgroup]\ndriver = \"none\"", []string{`cgroup.driver: "none"`}},
		{"slice for cgroupfs", "[cgroup]\ndriver = \"cgroupfs\"\nparent = \"a.slice\"", []string{"cgroup.parent: "}},
		{"path for systemd", "[cgroup]\ndriver = \"systemd\"\nparent = \"/a\"", []string{"cgroup.parent: "}},
		{"slice with empty part", "[cgroup]\ndriver = \"systemd\"\nparent = \"a--b.slice\"", []string{"cgroup.parent: "}},
		{"parent climbs", "[cgroup]\ndriver = \"cgroupfs\"\nparent = \"/a/../..\"", []string{"cgroup.parent: "}},
		{"no plugin dirs", "[network]\nbin_dirs = []", []string{"network.bin_dirs: "}},
		{"relative plugin dir", "[network]\nbin_dirs = [\"/a\", \"b\"]", []string{`network.bin_dirs: "b"`}},
		{"plugin timeout", "[network]\nplugin_timeout = \"-1s\"", []string{"network.plugin_timeout: "}},
		{"downloads", "[image]\nmax_concurrent_downloads = 0", []string{"image.max_concurrent_downloads: 0"}},
		{"infra image", "[image]\ninfra_image = \"A B\"", []string{"image.infra_image: "}},
		{"pinned", "[image]\npinned = [\"ok\", \"not ok\"]", []string{`image.pinned: "not ok"`}},
		{"no such default handler", "[runtime]\ndefault_handler = \"x\"", []string{"runtime.default_handler: ", "runtime.handlers.x"}},
		{"handler name", "[runtime.handlers.A_b]", []string{"runtime.handlers.A_b: "}},
		{"soft above hard", "[runtime]\nnofile_hard = 10", []string{"runtime.nofile_soft: "}},
		{"handler's soft above hard", "[runtime.handlers.a]\nnofile_soft = 1000000", []string{"runtime.handlers.a.nofile_soft: "}},
		{"bare time", "[network]\nplugin_timeout = 60", []string{"\"60\" is not a time"}},
		{"pids", "[runtime]\npids_limit = -1", []string{"runtime.pids_limit: -1"}},
		{"capability", "[runtime]\ndefault_capabilities = [\"CHOWN\"]", []string{`runtime.default_capabilities: "CHOWN"`}},
		{"seccomp", "[runtime]\nseccomp_profile = \"x.json\"", []string{"runtime.seccomp_profile: "}},
		{"all at once", "root = \"a\"\n[log]\nlevel = \"loud\"", []string{"root: ", "log.level: "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := load(t, tc.text)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not say %q", err, part)
				}
			}
		})
	}
}

func TestLoadAbsentFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.toml")
	cfg, err := Load(path, false)
	if err != nil || !reflect.DeepEqual(cfg, Default()) {
		t.Errorf("optional: %v, %+v", err, cfg)
	}
	if _, err := Load(path, true); err == nil {
		t.Error("an absent file that was asked for is accepted")
	}
}

func TestLoadKeepsOtherDefaults(t *testing.T) {
	cfg, err := load(t, "run = \"/r\"\n[network]\nbin_dirs = [\"/only\"]\n[runtime]\ndefault_capabilities = []\n[cgroup]\ndriver = \"systemd\"\n")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Run = "/r"
	want.CRI.Socket = "/r/podshim.sock"
	want.Cgroup = Cgroup{Driver: DriverSystemd, Parent: "podshim.slice"}
	want.Network.BinDirs = []string{"/only"}
	want.Runtime.DefaultCapabilities = []string{}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got\n%+v, want\n%+v", cfg, want)
	}
}

func TestShownConfigurationLoadsAgain(t *testing.T) {
	cfg, err := load(t, "[runtime]\ndefault_handler = \"b\"\n[runtime.handlers.b]\npids_limit = 7\ndefault_capabilities = []\n")
	if err != nil {
		t.Fatal(err)
	}
	text, err := cfg.TOML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := load(t, string(text))
	if err != nil || !reflect.DeepEqual(again, cfg) {
		t.Errorf("%v\n%+v, want\n%+v", err, again, cfg)
	}
}

func TestHandler(t *testing.T) {
	cfg, err := load(t, `
[runtime]
default_handler = "small"
nofile_soft = 100
nofile_hard = 200
[runtime.handlers.small]
nofile_soft = 10
default_capabilities = []
privileged_without_host_devices = true
[runtime.handlers.plain]
`)
	if err != nil {
		t.Fatal(err)
	}
	small := Resolved{Name: "small", NofileSoft: 10, NofileHard: 200, DefaultCapabilities: []string{}, PrivilegedWithoutHostDevices: true}
	plain := Resolved{Name: "plain", NofileSoft: 100, NofileHard: 200, DefaultCapabilities: Default().Runtime.DefaultCapabilities}
	for name, want := range map[string]Resolved{"": small, "small": small, "plain": plain} {
		if got, ok := cfg.Runtime.Handler(name); !ok || !reflect.DeepEqual(got, want) {
			t.Errorf("handler %q: %v %+v, want %+v", name, ok, got, want)
		}
	}
	if _, ok := cfg.Runtime.Handler("other"); ok {
		t.Error("a handler nobody configured exists")
	}
}

func TestDetectDriver(t *testing.T) {
	root := t.TempDir()
	if got := detectDriver(root); got != DriverCgroupfs {
		t.Errorf("without systemd: %s", got)
	}
	if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got := detectDriver(root); got != DriverSystemd {
		t.Errorf("with systemd: %s", got)
	}
}

func TestMonitorBinary(t *testing.T) {
	dir := t.TempDir()
	podmon := filepath.Join(dir, "podmon")
	t.Setenv("PATH", dir)
	cfg := Default()
	if err := os.WriteFile(podmon, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Monitor.Binary = podmon
	if got, err := cfg.MonitorBinary(); err == nil {
		t.Errorf("a file that cannot be executed is taken: %s", got)
	}
	if err := os.Chmod(podmon, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, binary := range []string{podmon, ""} {
		cfg.Monitor.Binary = binary
		if got, err := cfg.MonitorBinary(); err != nil || got != podmon {
			t.Errorf("monitor.binary = %q: %q, %v", binary, got, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(defaultFile)
	f.Add([]byte("[runtime.handlers.a]\nnofile_soft = 1\n"))
	f.Add([]byte("rooot = 1\nx.y = 2\n[[cri]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg := Default()
		if decode("f", data, cfg) != nil {
			return
		}
		_ = cfg.Complete()
	})
}
