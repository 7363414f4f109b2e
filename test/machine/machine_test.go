package machine

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestHeld makes one thing of each kind and expects it to be found, and not to
// be found before and after.
func TestHeld(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root (mounts, links, cgroups)")
	}
	// The thread keeps its network namespace and dies with the test.
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_NEWNET))

	dir := t.TempDir()
	s := Scope{
		Parent: os.Getpid(), Dir: dir, NetnsDir: filepath.Join(dir, "netns"), Bridge: "br0",
		CgroupParent: "/" + filepath.Base(filepath.Dir(dir)), Files: []string{filepath.Join(dir, "ipam")},
		Ignore: func(path string) bool { return filepath.Base(path) == "lock" },
	}
	roots, err := CgroupRoots()
	must(t, err)
	if len(roots) == 0 {
		t.Skip("SKIPPED: no cgroup hierarchy is mounted")
	}
	parent := filepath.Join(roots[0], s.CgroupParent)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: s.Bridge}}
	must(t, netlink.LinkAdd(bridge))
	for _, d := range []string{s.NetnsDir, s.Files[0], filepath.Join(dir, "mnt"), parent} {
		must(t, os.Mkdir(d, 0o755))
	}
	t.Cleanup(func() { must(t, os.Remove(parent)) })
	must(t, os.WriteFile(filepath.Join(s.Files[0], "lock"), nil, 0o600))

	for _, test := range []struct {
		kind, name string
		make, undo func() error
	}{{
		"mount", filepath.Join(dir, "mnt") + " (tmpfs)",
		func() error { return unix.Mount("tmpfs", filepath.Join(dir, "mnt"), "tmpfs", 0, "") },
		func() error { return unix.Unmount(filepath.Join(dir, "mnt"), 0) },
	}, {
		"network namespace", filepath.Join(s.NetnsDir, "one"),
		func() error { return os.WriteFile(filepath.Join(s.NetnsDir, "one"), nil, 0o600) },
		func() error { return os.Remove(filepath.Join(s.NetnsDir, "one")) },
	}, {
		"link", "port0 (veth)",
		func() error {
			attrs := netlink.LinkAttrs{Name: "port0", MasterIndex: bridge.Index}
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "pod0"})
		},
		func() error { return netlink.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port0"}}) },
	}, {
		"cgroup", filepath.Join(parent, "pod"),
		func() error { return os.Mkdir(filepath.Join(parent, "pod"), 0o755) },
		func() error { return os.Remove(filepath.Join(parent, "pod")) },
	}, {
		"file", filepath.Join(s.Files[0], "10.1.2.3"),
		func() error { return os.WriteFile(filepath.Join(s.Files[0], "10.1.2.3"), nil, 0o600) },
		func() error { return os.Remove(filepath.Join(s.Files[0], "10.1.2.3")) },
	}} {
		// No subtests: they would run on threads outside the namespace.
		before := held(t, s)
		must(t, test.make())
		leaks := Leaks(before, held(t, s))
		must(t, test.undo())
		if want := (Thing{test.kind, test.name}); !slices.Equal(leaks, []Thing{want}) {
			t.Errorf("found %v, want %v", leaks, want)
		}
		if leaks := Leaks(before, held(t, s)); len(leaks) > 0 {
			t.Errorf("found %v after it was undone", leaks)
		}
	}
}

func TestHeldProcess(t *testing.T) {
	s := Scope{Parent: os.Getpid()}
	before := held(t, s)
	child := exec.Command("sleep", "1000")
	must(t, child.Start())
	leaks := Leaks(before, held(t, s))
	s.Except = []int{child.Process.Pid}
	excepted := Leaks(before, held(t, s))
	must(t, Kill(child.Process.Pid, 10*time.Second))
	_ = child.Wait() // it was killed
	if len(leaks) != 1 || leaks[0].Kind != "process" || len(excepted) != 0 {
		t.Errorf("found %v, with the process excepted %v, want one and none", leaks, excepted)
	}
	if err := Kill(child.Process.Pid, time.Second); err != nil {
		t.Errorf("kill the gone: %v", err)
	}
}

// TestFirewall tells a pod's rules from what portmap sets up once.
func TestFirewall(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root (network namespace)")
	}
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	nft := func(script string) {
		t.Helper()
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	}
	s := Scope{Whole: true, Bridge: "none"}
	nft(`add table ip nat
add chain ip nat CNI-HOSTPORT-DNAT
add chain ip nat PREROUTING { type nat hook prerouting priority -100; }
add rule ip nat PREROUTING jump CNI-HOSTPORT-DNAT`)
	before, err := s.firewall()
	must(t, err)
	if len(before) > 0 {
		t.Errorf("portmap's own rules count as held: %v", before)
	}
	nft(`add chain ip nat CNI-DN-0123
add rule ip nat CNI-HOSTPORT-DNAT tcp dport 80 jump CNI-DN-0123
add rule ip nat PREROUTING tcp dport 81 redirect to :82`)
	after, err := s.firewall()
	must(t, err)
	if len(after) != 3 {
		t.Errorf("found %v, want a chain and two rules", after)
	}
}

func held(t *testing.T, s Scope) []Thing {
	t.Helper()
	things, err := s.Held()
	must(t, err)
	return things
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
