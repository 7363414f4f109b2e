package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// leaver is in the environment of this binary when it is a plugin that leaves its group and hangs.
const leaver = "PODSHIM_TEST_LEAVER=1"

func TestMain(m *testing.M) {
	if slices.Contains(os.Environ(), leaver) {
		group, err := unix.Getpgid(os.Getppid())
		if err == nil {
			err = unix.Setpgid(0, group)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintln(os.Stderr, "left")
		time.Sleep(time.Minute)
	}
	os.Exit(m.Run())
}

// TestExecPlugin runs plugins from a daemon with few descriptors and from one with many, which
// have another thread make them.
func TestExecPlugin(t *testing.T) {
	for _, crowd := range []int{0, 600} {
		for range crowd {
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		}
		t.Run(fmt.Sprint(crowd), func(t *testing.T) {
			execPlugins(t)
		})
	}
}

func execPlugins(t *testing.T) {
	dir := t.TempDir()
	script := func(body string) string {
		path := filepath.Join(dir, "plugin")
		if err := os.WriteFile(path+"~", []byte("#!/bin/sh\n"+body), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+"~", path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	run := func(ctx context.Context, limit time.Duration, path, stdin string, environ ...string) (string, error) {
		r := &runner{limit: limit}
		out, err := r.ExecPlugin(ctx, path, []byte(stdin), append(environ, "CNI_COMMAND=DEL"))
		return string(out), err
	}

	t.Run("is given its input and leads a group", func(t *testing.T) {
		long := strings.Repeat("x", 1<<18) // more than a pipe holds
		out, err := run(t.Context(), time.Minute, script(`pwd; cut -d' ' -f1,5 /proc/$$/stat; wc -c`), long)
		var pid, group int
		if fields := strings.Fields(out); err != nil || len(fields) < 4 || fields[0] != "/" || fields[len(fields)-1] != fmt.Sprint(len(long)) {
			t.Errorf("%v: %q", err, out)
		} else if fmt.Sscan(fields[1]+" "+fields[2], &pid, &group); pid == 0 || pid != group {
			t.Errorf("process %d is in group %d", pid, group)
		}
	})
	t.Run("need not read its input", func(t *testing.T) {
		if _, err := run(t.Context(), time.Minute, script(`exit 0`), strings.Repeat("x", 1<<18)); err != nil {
			t.Error(err)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		_, err := run(t.Context(), 2*time.Second, script(`sleep 321 & echo $! >`+dir+`/sleeper; wait`), "")
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no answer in 2s, killed") {
			t.Errorf("%v", err)
		}
		pid, err := os.ReadFile(filepath.Join(dir, "sleeper"))
		if err != nil {
			t.Fatal(err)
		}
		awaitGone(t, strings.TrimSpace(string(pid)))
	})
	t.Run("leaves its group and hangs", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		_, err = run(t.Context(), 2*time.Second, self, "", leaver)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no answer in 2s, killed; stderr: left") {
			t.Errorf("%v", err)
		}
	})
	t.Run("floods", func(t *testing.T) {
		if _, err := run(t.Context(), time.Minute, script(`exec yes`), ""); err == nil || !strings.Contains(err.Error(), "1048576 bytes") {
			t.Errorf("%v", err)
		}
	})
	t.Run("leaves a child with its output", func(t *testing.T) {
		out, err := run(t.Context(), time.Minute, script(`sleep 321 & echo $!`), "")
		killChild(t, out)
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("leaves a child that has not said all when the caller gives up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		fifo := filepath.Join(dir, "at")
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		said := make(chan string)
		go func() {
			pid, _ := os.ReadFile(fifo)
			cancel()
			said <- string(pid)
		}()
		_, err := run(ctx, time.Minute, script(`{ while readlink /proc/$$/exe; do :; done; sleep 321 & echo $! >`+fifo+`; wait; } &`), "")
		killChild(t, <-said)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want Canceled", err)
		}
	})
	t.Run("cannot be executed", func(t *testing.T) {
		path := script("")
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := run(t.Context(), time.Minute, path, ""); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "install it again") {
			t.Errorf("%v", err)
		}
	})
	t.Run("is still being written", func(t *testing.T) {
		path := script("echo late")
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(200*time.Millisecond, func() { f.Close() })
		if out, err := run(t.Context(), time.Minute, path, ""); err != nil || out != "late\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
}

// killChild ends a plugin's child, if the limit has not.
func killChild(t *testing.T, said string) {
	t.Helper()
	var pid int
	if _, err := fmt.Sscan(said, &pid); err != nil {
		t.Fatalf("%q: %v", said, err)
	}
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && string(comm) == "sleep\n" {
		unix.Kill(pid, unix.SIGKILL)
	}
}

// A plugin looks for iptables in the daemon's PATH, or where it is as a rule.
func TestPluginEnv(t *testing.T) {
	for given, want := range map[string]string{"": "PATH=/usr/local/sbin:", "PATH=": "PATH=/usr/local/sbin:", "PATH=/opt": "PATH=/opt"} {
		env := pluginEnv([]string{"A=b", given, "NOTIFY_SOCKET=/x"})
		env = slices.DeleteFunc(env, func(kv string) bool { return kv == "" })
		if len(env) != 2 || env[0] != "A=b" || !strings.HasPrefix(env[1], want) {
			t.Errorf("of %q: %q", given, env)
		}
	}
}
