package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/host"
)

func TestForgetDue(t *testing.T) {
	n := &Network{live: map[string]struct{}{}}
	for pod := 1; pod <= 4*forgetEvery; pod++ {
		n.setLive(fmt.Sprint(pod), true)
		if got, want := n.forgetDue(), pod >= manyPods && pod%forgetEvery == 0; got != want {
			t.Errorf("with %d pods: %v", pod, got)
		}
	}
	for pod := manyPods; pod <= 4*forgetEvery; pod++ {
		n.setLive(fmt.Sprint(pod), false)
	}
	for range 2 * forgetEvery {
		if n.forgetDue() {
			t.Errorf("with %d pods, and others that come and go", manyPods-1)
		}
	}
}

// What is cached of a network namespace's /proc/sys goes once there are many pods.
func TestManyPodsAreForgotten(t *testing.T) {
	needRoot(t)
	if userns.RunningInUserNS() {
		t.Skip("SKIPPED: /proc cannot be reconfigured in a user namespace")
	}
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP}, oneConf)
	netns := filepath.Join(netnsDir(t), "nobody's")
	if err := NewNetns(netns); err != nil {
		t.Fatal(err)
	}
	look := func() (inode uint64) { // an entry keeps its number for as long as it is cached
		t.Helper()
		err := Do(netns, func() error {
			var st unix.Stat_t
			err := unix.Stat("/proc/sys/net/ipv4", &st)
			inode = st.Ino
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return inode
	}
	before := look()
	for i := range manyPods {
		if _, err := s.Add(t.Context(), testPod(fmt.Sprint("p", i))); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(10 * time.Second); look() == before; time.Sleep(10 * time.Millisecond) { // it has no event
		if time.Now().After(end) {
			t.Fatalf("/proc/sys/net/ipv4 is still inode %d", before)
		}
	}
}

// What looking up a path of the node's takes, beside the network namespaces of 400 pods and a processor
// whose caches hold other things.
func BenchmarkLookUp(b *testing.B) {
	needRoot(b)
	dir := netnsDir(b)
	open := func() error {
		for _, path := range []string{"/proc/sys/net/ipv4/conf/lo/arp_notify", "/proc/sys/net/ipv6/conf/lo/accept_ra"} {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			f.Close()
		}
		return nil
	}
	node := filepath.Join(dir, "node")
	for i := range 401 {
		path := filepath.Join(dir, fmt.Sprint(i))
		if i == 0 {
			path = node // its entries are the oldest
		}
		if err := NewNetns(path); err != nil {
			b.Fatal(err)
		}
		if err := Do(path, open); err != nil {
			b.Fatal(err)
		}
	}
	others := make([]byte, 64<<20)
	for _, name := range []string{"beside 400", "beside 400 that are forgotten"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				for i := 0; i < len(others); i += 64 {
					others[i]++
				}
				err := Do(node, func() error {
					b.StartTimer()
					err := open()
					b.StopTimer()
					return err
				})
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
		if err := host.ForgetProc(); err != nil {
			b.Fatal(err)
		}
	}
}
