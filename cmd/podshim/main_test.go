package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/config"
)

// podshim runs the command in process and returns what it printed.
func podshim(args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(args, &out, &errs)
	return status, out.String(), errs.String()
}

func TestUnknownKeyEndsWithFileAndLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte("[log]\nlevel = \"info\"\ncolour = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--config", path}, {"config", "show", "--config", path}, {"check", "--config", path}} {
		status, _, stderr := podshim(args...)
		if status != 1 || stderr != "podshim: "+path+":3:1: unknown key log.colour\n" {
			t.Errorf("%q: exit %d, %q", args, status, stderr)
		}
	}
}

func TestConfigFileThatWasAskedForMustBeThere(t *testing.T) {
	status, _, stderr := podshim("--config", filepath.Join(t.TempDir(), "none"), "config", "show")
	if status != 1 || !strings.Contains(stderr, "no such file") {
		t.Errorf("exit %d, %q", status, stderr)
	}
}

func TestBadUsage(t *testing.T) {
	for _, args := range [][]string{{"nonsense"}, {"--nonsense"}, {"config", "nonsense"}, {"explain"}, {"config", "default", "x"}, {"--log-level", "loud"}, {"check", "--root", "rel"}} {
		if status, stdout, stderr := podshim(args...); status != 1 || stdout != "" || !strings.HasPrefix(stderr, "podshim: ") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", args, status, stdout, stderr)
		}
	}
}

func TestExplainWithoutADaemon(t *testing.T) {
	dir := t.TempDir()
	status, _, stderr := podshim("explain", "--run", dir, "shop")
	if want := "podshim: no podshim runs on " + dir + ": start it, or give explain its --config or --run\n"; status != 1 || stderr != want {
		t.Errorf("exit %d, %q", status, stderr)
	}
}

func TestConfigDefaultLoads(t *testing.T) {
	status, stdout, _ := podshim("config", "default")
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	if status != 0 {
		t.Fatalf("exit %d", status)
	}
	if status, _, stderr := podshim("--config", path, "config", "show"); status != 0 {
		t.Errorf("its own default file is refused: %s", stderr)
	}
}

// Each flag must change the key it names, and nothing else.
func TestFlagsOverrideTheirKeys(t *testing.T) {
	values := map[string]string{
		"log.level": "debug", "log.format": "json",
		"cgroup.driver": config.DriverSystemd, "cgroup.parent": "/other",
	}
	for _, f := range flags {
		value, ok := values[f.key]
		if !ok {
			value = "/some/where"
		}
		dir := t.TempDir()
		base := filepath.Join(dir, "base.toml")
		if err := os.WriteFile(base, []byte("[cgroup]\ndriver = \"cgroupfs\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// What the file says with the key set is what the flag must give.
		text := "v = \"" + value + "\""
		if _, isList := f.field(new(config.Config)).(*[]string); isList {
			text = "v = [\"" + value + "\"]"
		}
		table, key, ok := strings.Cut(f.key, ".")
		if !ok {
			table, key = "", f.key
		}
		text = key + text[1:] + "\n"
		if table != "" {
			text = "[" + table + "]\n" + text
		}
		if f.key != "cgroup.driver" {
			text = strings.Replace(text+"[cgroup]\ndriver = \"cgroupfs\"\n", "[cgroup]\nparent = \"/other\"\n[cgroup]", "[cgroup]\nparent = \"/other\"", 1)
		}
		byFile := filepath.Join(dir, "key.toml")
		if err := os.WriteFile(byFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, want, werr := podshim("--config", byFile, "config", "show")
		_, got, gerr := podshim("--config", base, "config", "show", "--"+f.name, value)
		if got != want || got == "" {
			t.Errorf("--%s: %s\n%s\nthe file: %s\n%s", f.name, gerr, got, werr, want)
		}
	}
}

func TestVersion(t *testing.T) {
	old := version
	version = "v9.8.7"
	t.Cleanup(func() { version = old })
	status, stdout, _ := podshim("version")
	if status != 0 || !strings.HasPrefix(stdout, "podshim v9.8.7\n") || !strings.Contains(stdout, "CRI     v1\n") {
		t.Errorf("exit %d: %s", status, stdout)
	}
}

func TestHelpExplains(t *testing.T) {
	status, stdout, _ := podshim("--help")
	if status != 0 {
		t.Fatalf("exit %d", status)
	}
	for _, f := range flags {
		if !strings.Contains(stdout, "--"+f.name+" ") || !strings.Contains(stdout, f.key+": ") {
			t.Errorf("help does not say which key --%s overrides", f.name)
		}
	}
}

func TestLogger(t *testing.T) {
	cfg := config.Default()
	cfg.Log = config.Log{Level: "warn", Format: "json"}
	var out bytes.Buffer
	log := newLogger(cfg, &out)
	log.Info("not this")
	log.WithField("pod", "p").Warn("this")
	var line map[string]string
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if line["msg"] != "this" || line["pod"] != "p" || line["level"] != logrus.WarnLevel.String() {
		t.Errorf("logged %v", line)
	}
}
