package cni

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

func TestGivesIPv4Only(t *testing.T) {
	const (
		v4 = `"ranges":[[{"subnet":"10.1.0.0/24"}]]`
		v6 = `"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"fd00:1::/64"}]]`
	)
	plugin := func(kind, ipam, pool string) string {
		return fmt.Sprintf(`{"type":%q,"ipam":{"type":%q,%s}}`, kind, ipam, pool)
	}
	for name, c := range map[string]struct {
		plugins string
		want    bool
	}{
		"bridge":              {plugin("bridge", "host-local", v4), true},
		"ptp, the old shape":  {plugin("ptp", "host-local", `"subnet":"10.1.0.0/24"`), true},
		"with ports":          {plugin("bridge", "host-local", v4) + `,{"type":"portmap"},{"type":"bandwidth"},{"type":"firewall"}`, true},
		"both families":       {plugin("bridge", "host-local", v6), false},
		"IPv6, the old shape": {plugin("bridge", "host-local", `"subnet":"fd00:1::/64"`), false},
		"IPv6 beside a range": {plugin("bridge", "host-local", `"subnet":"fd00:1::/64",`+v4), false},
		"an IPv4 route":       {plugin("bridge", "host-local", v4+`,"routes":[{"dst":"0.0.0.0/0"}]`), true},
		"an IPv6 route":       {plugin("bridge", "host-local", v4+`,"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]`), false},
		"no range":            {plugin("bridge", "host-local", `"ranges":[]`), false},
		"no subnet":           {plugin("bridge", "host-local", `"ranges":[[{"subnet":"?"}]]`), false},
		"another IPAM":        {plugin("bridge", "dhcp", v4), false},
		"no IPAM":             {`{"type":"bridge"}`, false},
		"on the node's own":   {plugin("macvlan", "host-local", v4), false},
		"another plugin":      {plugin("other", "host-local", v4), false},
		"another after it":    {plugin("bridge", "host-local", v4) + `,{"type":"other"}`, false},
		"settings after it":   {plugin("bridge", "host-local", v4) + `,{"type":"tuning"}`, false},
		"portmap before it":   {`{"type":"portmap"},` + plugin("bridge", "host-local", v4), false},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := libcni.NetworkConfFromBytes([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[` + c.plugins + `]}`))
			if err != nil {
				t.Fatal(err)
			}
			if got := givesIPv4Only(list); got != c.want {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

// By what the kernel says: an interface without an IPv6 address of its network has none, where
// nobody asks for it, and lo has its own.
func TestRealIPv6(t *testing.T) {
	only4 := strings.NewReplacer(`,[{"subnet":"fd00:213:7::/64"}]`, "", `,{"dst":"::/0"}`, "").Replace(realConf)
	for name, c := range map[string]struct {
		conf      string
		asked     bool // by the pod
		idle      bool // by the configuration
		addresses int  // of IPv6, link-local ones included
	}{
		"IPv4 only":                {only4, false, false, 0},
		"IPv4 only, the pod asks":  {only4, true, false, 1},
		"IPv4 only, all pods have": {only4, false, true, 1},
		"IPv4 and an IPv6 route":   {strings.Replace(realConf, `,[{"subnet":"fd00:213:7::/64"}]`, "", 1), false, false, 1},
		"both families":            {realConf, false, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			n := newRealNode(t, c.conf, "bridge", "host-local", "portmap")
			n.cfg.IdleIPv6 = c.idle
			pod := n.pod("a")
			pod.IPv6 = c.asked
			n.onHost(func() error {
				_, err := n.Add(t.Context(), pod)
				return err
			})
			err := Do(pod.Netns, func() error {
				for link, want := range map[string]int{"lo": 1, "eth0": c.addresses} {
					addrs, err := addresses6(link, want)
					if err != nil {
						return err
					}
					if len(addrs) != want {
						t.Errorf("%s has the IPv6 addresses %v, want %d", link, addrs, want)
					}
				}
				off, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6")
				if got := strings.TrimSpace(string(off)); err != nil || (got == "1") != (c.addresses == 0) {
					t.Errorf("disable_ipv6 of eth0 is %q (%v)", got, err)
				}
				// What the pod makes itself is as ever.
				if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "later"}, PeerName: "peer"}); err != nil {
					return err
				}
				off, err = os.ReadFile("/proc/sys/net/ipv6/conf/later/disable_ipv6")
				if got := strings.TrimSpace(string(off)); err != nil || got != "0" {
					t.Errorf("disable_ipv6 of a later interface is %q (%v)", got, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			n.onHost(func() error { return n.Del(t.Context(), pod) })
			if held := n.held(); len(held) != 0 {
				t.Errorf("held after DEL: %q", held)
			}
		})
	}
}

// addresses6 are those of a link that is up, once they are as many as wanted: the kernel makes
// link-local ones when it has seen that the link has a carrier.
func addresses6(link string, want int) ([]netlink.Addr, error) {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return nil, err
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
		up := l.Attrs().OperState == netlink.OperUp || link == "lo"
		if err != nil || up && len(addrs) == want || time.Now().After(end) {
			return addrs, err
		}
	}
}

// What attaching one more pod to a bridge takes, beside many. Each stays.
func BenchmarkAddBeside(b *testing.B) {
	conf := strings.NewReplacer(`,[{"subnet":"fd00:213:7::/64"}]`, "", `,{"dst":"::/0"}`, "", `10.213.7.0/24`, "10.213.0.0/16",
		`"ipMasq":true,`, "").Replace(realConf)
	for _, beside := range []int{10, 400} {
		for _, idle := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d, link-local IPv6 %v", beside, idle), func(b *testing.B) {
				n := newRealNode(b, conf, "bridge", "host-local", "portmap")
				n.cfg.IdleIPv6 = idle
				var pods []Pod
				b.Cleanup(func() { n.leave(pods) })
				attach := func(i int) {
					pod := n.pod(fmt.Sprint(i))
					pods = append(pods, pod)
					n.onHost(func() error {
						_, err := n.Add(b.Context(), pod)
						return err
					})
				}
				for i := range beside {
					attach(i)
				}
				for i := beside; b.Loop(); i++ {
					attach(i)
				}
			})
		}
	}
}

// leave has the kernel free the pods' namespaces before anybody else is measured.
func (n *realNode) leave(pods []Pod) {
	for _, p := range pods {
		if err := Remove(p.Netns); err != nil {
			n.t.Error(err)
		}
	}
	n.onHost(func() error {
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Type() == "veth" }) {
				return nil
			}
		}
		return errors.New("the pods' interfaces stay")
	})
}
