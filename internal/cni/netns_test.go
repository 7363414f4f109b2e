package cni

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
}

// netnsDir is a directory for pins that is unmounted when the test ends.
func netnsDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "netns")
	t.Cleanup(func() {
		paths, _ := List(dir, "")
		for _, p := range paths {
			if err := Remove(p); err != nil {
				t.Errorf("clean up: %v", err)
			}
		}
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	})
	return dir
}

func newTestNetns(t testing.TB) string {
	t.Helper()
	needRoot(t)
	path := filepath.Join(netnsDir(t), "pod")
	if err := NewNetns(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func mountsAt(t testing.TB, path string) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 6 && f[4] == path {
			found = append(found, line)
		}
	}
	return found
}

func TestNetnsIsNewAndPinned(t *testing.T) {
	path := newTestNetns(t)
	own := inode(t, "/proc/self/ns/net")
	pinned := inode(t, path)
	if own == pinned {
		t.Fatal("pinned the daemon's own network namespace")
	}
	var inside uint64
	err := Do(path, func() error {
		inside = inode(t, "/proc/thread-self/ns/net")
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if lo.Attrs().Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		if len(addrs) != 1 || addrs[0].IP.String() != "127.0.0.1" {
			t.Errorf("lo has %v, want 127.0.0.1", addrs)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if inside != pinned {
		t.Errorf("Do ran in namespace %d, want %d", inside, pinned)
	}
	if m := mountsAt(t, filepath.Dir(path)); len(m) != 1 || !strings.Contains(m[0], "shared:") {
		t.Errorf("mounts of the directory: %q, want one shared", m)
	}
	if err := NewNetns(path); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second NewNetns at the same path: %v, want AlreadyExists", err)
	}
	if got := inode(t, path); got != pinned {
		t.Error("the refused NewNetns replaced the namespace")
	}
}

func TestEveryThreadGoesBack(t *testing.T) {
	path := newTestNetns(t)
	boom := errors.New("boom")
	for range 20 {
		if err := Do(path, func() error { return boom }); !errors.Is(err, boom) {
			t.Fatalf("Do: %v, want f's own error", err)
		}
	}
	want := inode(t, "/proc/self/ns/net")
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var st unix.Stat_t
		if err := unix.Stat(task, &st); err == nil && st.Ino != want {
			t.Errorf("%s is in another network namespace", task)
		}
	}
}

func TestRemoveIsIdempotent(t *testing.T) {
	path := newTestNetns(t)
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err) // a second mount on top
	}
	for range 2 {
		if err := Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if m := mountsAt(t, path); len(m) != 0 {
		t.Errorf("still mounted: %q", m)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("file is left: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := Do(path, func() error { return nil }); !errdefs.IsNotFound(err) {
		t.Errorf("Do in a plain file: %v, want NotFound", err)
	}
	if err := Remove(path); err != nil {
		t.Errorf("plain file left by a crash: %v", err)
	}
	if err := Do(path, func() error { return nil }); !errdefs.IsNotFound(err) {
		t.Errorf("Do in the gone: %v, want NotFound", err)
	}
	if err := Remove(filepath.Join(path, "below")); err != nil {
		t.Errorf("a path whose directory is gone: %v", err)
	}
}

func TestFailedPinLeavesNothing(t *testing.T) {
	needRoot(t)
	dir := netnsDir(t)
	user, pod := filepath.Join(dir, "user"), filepath.Join(dir, "net")
	twice := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1, Size: 10}, {ContainerID: 5, HostID: 100, Size: 10}}
	if err := NewUserNetns(user, pod, twice, twice); err == nil {
		t.Error("overlapping mappings were accepted")
	}
	if err := NewUserNetns(user, pod, nil, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without mappings: %v, want InvalidArgument", err)
	}
	if err := os.WriteFile(pod, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	ok := []specs.LinuxIDMapping{{HostID: 200000, Size: 65536}}
	if err := NewUserNetns(user, pod, ok, ok); !errdefs.IsAlreadyExists(err) {
		t.Errorf("with the net path taken: %v, want AlreadyExists", err)
	}
	left, err := List(dir, "")
	if err != nil || len(left) != 1 || left[0] != pod {
		t.Errorf("left: %q, %v; want only the file that was there before", left, err)
	}
}

func TestUserNetns(t *testing.T) {
	needRoot(t)
	dir := netnsDir(t)
	user, pod := filepath.Join(dir, "user"), filepath.Join(dir, "net")
	maps := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	if err := NewUserNetns(user, pod, maps, maps); err != nil {
		t.Fatal(err)
	}
	netFD, err := unix.Open(pod, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(netFD)
	ownerFD, err := unix.IoctlRetInt(netFD, unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ownerFD)
	var owner unix.Stat_t
	if err := unix.Fstat(ownerFD, &owner); err != nil {
		t.Fatal(err)
	}
	if owner.Ino != inode(t, user) {
		t.Error("the network namespace is not owned by the pinned user namespace")
	}
	if err := Do(pod, func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil && lo.Attrs().Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if kids := children(t); len(kids) != 0 {
		t.Errorf("processes left: %v", kids)
	}
	if err := errors.Join(Remove(user), Remove(pod)); err != nil {
		t.Error(err)
	}
}

// children lists this process's children, zombies too.
func children(t *testing.T) []string {
	t.Helper()
	files, _ := filepath.Glob("/proc/self/task/*/children")
	var kids []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil {
			kids = append(kids, strings.Fields(string(b))...)
		}
	}
	return kids
}

func TestDialReachesLocalhostOfThePod(t *testing.T) {
	path := newTestNetns(t)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(addr, func(t *testing.T) {
			var l net.Listener
			if err := Do(path, func() (err error) {
				l, err = net.Listen("tcp", addr)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			served := make(chan error, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					served <- err
					return
				}
				defer c.Close()
				all, err := io.ReadAll(c) // ends at the dialler's half-close
				if err == nil {
					_, err = fmt.Fprintf(c, "got %s", all)
				}
				served <- err
			}()
			port := l.Addr().(*net.TCPAddr).Port
			c, err := Dial(t.Context(), path, "tcp", port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprint(c, "hello")
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			answer, err := bufio.NewReader(c).ReadString(0)
			if answer != "got hello" || !errors.Is(err, io.EOF) {
				t.Errorf("answer %q, %v", answer, err)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
			if c, err := Dial(t.Context(), "", "tcp", port); err == nil {
				c.Close()
				t.Error("the pod's port is reachable in the host's namespace")
			}
		})
	}
}

func TestDialErrors(t *testing.T) {
	path := newTestNetns(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		name  string
		ctx   context.Context
		path  string
		netw  string
		port  int
		class func(error) bool
	}{
		{"nobody listens", t.Context(), path, "tcp", 1, errdefs.IsUnavailable},
		{"no namespace", t.Context(), path + "x", "tcp", 1, errdefs.IsNotFound},
		{"port 0", t.Context(), path, "tcp", 0, errdefs.IsInvalidArgument},
		{"port too high", t.Context(), path, "tcp", 65536, errdefs.IsInvalidArgument},
		{"not tcp", t.Context(), path, "udp", 1, errdefs.IsInvalidArgument},
		{"cancelled", cancelled, path, "tcp", 1, func(err error) bool { return errors.Is(err, context.Canceled) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			if conn, err := Dial(c.ctx, c.path, c.netw, c.port); !c.class(err) {
				t.Errorf("%v, %v", conn, err)
			}
		})
	}
}

func TestStatsCountTraffic(t *testing.T) {
	path := newTestNetns(t)
	before, err := Stats(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) == 0 || before[0].Name != "lo" {
		t.Fatalf("interfaces: %+v, want lo", before)
	}
	if err := Do(path, func() error {
		c, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(make([]byte, 1000))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	after, err := Stats(path)
	if err != nil {
		t.Fatal(err)
	}
	// 1000 bytes, a UDP and an IP header and lo's Ethernet header, both ways.
	if got := after[0].TxBytes - before[0].TxBytes; got < 1042 {
		t.Errorf("tx grew by %d bytes, want at least 1042", got)
	}
	if got := after[0].RxBytes - before[0].RxBytes; got < 1042 {
		t.Errorf("rx grew by %d bytes, want at least 1042", got)
	}
	if after[0].RxPackets == before[0].RxPackets {
		t.Error("no packet was counted")
	}
	if _, err := Stats(path + "x"); !errdefs.IsNotFound(err) {
		t.Errorf("no namespace: %v, want NotFound", err)
	}
}

func BenchmarkNetns(b *testing.B) {
	needRoot(b)
	dir := netnsDir(b)
	for i := range b.N {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := NewNetns(path); err != nil {
			b.Fatal(err)
		}
		if err := Remove(path); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStats(b *testing.B) {
	path := newTestNetns(b)
	for range b.N {
		if _, err := Stats(path); err != nil {
			b.Fatal(err)
		}
	}
}
