package cni

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
)

// realNode is a Network of real plugins on a network stack of its own: the
// plugins run in a network namespace that plays the host, so that bridges and
// packet filter rules are nobody else's.
type realNode struct {
	*Network
	t      testing.TB
	host   string // the network namespace that plays the host
	dir    string
	leases string // host-local's records
}

// pluginDir is where `make tools` puts the real plugins. Those of the machine are
// not asked: Debian 12's portmap (1.1.1) says of its own IPv6 mappings that they
// are missing.
func pluginDir(t testing.TB, plugins ...string) string {
	t.Helper()
	dir := os.Getenv("PODSHIM_TOOLS_DIR")
	if dir == "" {
		dir = filepath.Join("..", "..", "_artifacts", "tools")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plugins {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			t.Skipf("SKIPPED: %v (`make tools` builds the plugins; PODSHIM_TOOLS_DIR says where they are)", err)
		}
	}
	return dir
}

func newRealNode(t testing.TB, conf string, plugins ...string) *realNode {
	t.Helper()
	needRoot(t)
	bin := pluginDir(t, plugins...)
	dir := t.TempDir()
	node := &realNode{t: t, dir: netnsDir(t), leases: filepath.Join(dir, "leases")}
	node.host = filepath.Join(node.dir, "host")
	if err := NewNetns(node.host); err != nil {
		t.Fatal(err)
	}
	confDir := filepath.Join(dir, "net.d")
	if err := os.Mkdir(confDir, 0o755); err != nil {
		t.Fatal(err)
	}
	conf = strings.ReplaceAll(conf, "LEASES", node.leases)
	if err := os.WriteFile(filepath.Join(confDir, "10.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	var err error
	node.Network, err = New(Config{
		ConfDir: confDir, BinDirs: []string{bin}, CacheDir: filepath.Join(dir, "cache"), Log: logrus.NewEntry(log),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(node.Close)
	return node
}

func (n *realNode) pod(id string) Pod {
	n.t.Helper()
	pod := Pod{ID: id, Name: id, Namespace: "test", UID: "u-" + id, Netns: filepath.Join(n.dir, id)}
	if err := NewNetns(pod.Netns); err != nil {
		n.t.Fatal(err)
	}
	return pod
}

// onHost runs f with the plugins' processes in the node's host namespace.
func (n *realNode) onHost(f func() error) {
	n.t.Helper()
	if err := Do(n.host, f); err != nil {
		n.t.Fatal(err)
	}
}

// held is everything of pods that the node holds.
func (n *realNode) held() []string {
	n.t.Helper()
	var held []string
	n.onHost(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "veth" || l.Type() == "ifb" {
				held = append(held, l.Type()+" "+l.Attrs().Name)
			}
		}
		return err
	})
	leases, _ := filepath.Glob(filepath.Join(n.leases, "*", "*.*.*"))
	leases6, _ := filepath.Glob(filepath.Join(n.leases, "*", "*:*"))
	cached, _ := filepath.Glob(filepath.Join(n.cfg.CacheDir, "*", "*"))
	return append(append(append(held, leases...), leases6...), cached...)
}

// rules are the host's packet filter rules.
func (n *realNode) rules() string {
	n.t.Helper()
	var out []byte
	n.onHost(func() (err error) {
		out, err = exec.Command("iptables-save").CombinedOutput()
		if err != nil {
			return fmt.Errorf("iptables-save: %w: %s", err, out)
		}
		return nil
	})
	return string(out)
}

const realConf = `{"cniVersion":"1.0.0","name":"podshimtest","plugins":[
 {"type":"bridge","bridge":"psttest0","isGateway":true,"ipMasq":true,"hairpinMode":true,"capabilities":{"ips":true,"mac":true},
  "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.213.7.0/24"}],[{"subnet":"fd00:213:7::/64"}]],
          "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
 {"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}`

func TestRealPlugins(t *testing.T) {
	n := newRealNode(t, realConf, "bridge", "host-local", "portmap")
	a, b := n.pod("a"), n.pod("b")
	a.PortMappings = []PortMapping{{HostPort: 18213, ContainerPort: 8080, Protocol: "tcp"}}
	b.MAC = "02:13:00:00:00:0b"
	results := map[string]Result{}
	n.onHost(func() error {
		for _, p := range []Pod{a, b} {
			r, err := n.Add(t.Context(), p)
			if err != nil {
				return err
			}
			results[p.ID] = r
		}
		return nil
	})
	for id, r := range results {
		if len(r.IPs) != 2 || !r.IPs[0].Is4() || !r.IPs[1].Is6() {
			t.Fatalf("pod %s has %v, want an IPv4 and an IPv6 address", id, r.IPs)
		}
	}
	checkEth0(t, a.Netns, results["a"], "")
	checkEth0(t, b.Netns, results["b"], b.MAC)
	n.onHost(func() error { return n.Check(t.Context(), a) })

	// b reaches a by its IP; the host reaches a by the mapped port.
	serve(t, a.Netns, "8080")
	if got := fetch(t, b.Netns, net.JoinHostPort(results["a"].IPs[0].String(), "8080")); got != "hello" {
		t.Errorf("from pod to pod: %q", got)
	}
	if rules := n.rules(); !strings.Contains(rules, "10.213.7.") || !strings.Contains(rules, "18213") {
		t.Errorf("rules for masquerade and port mapping are missing:\n%s", rules)
	}
	bridgeIP := "10.213.7.1"
	if got := fetch(t, n.host, bridgeIP+":18213"); got != "hello" {
		t.Errorf("through the mapped port: %q", got)
	}

	n.onHost(func() error {
		for _, p := range []Pod{a, b, a} {
			if err := n.Del(t.Context(), p); err != nil {
				return err
			}
		}
		return nil
	})
	if held := n.held(); len(held) != 0 {
		t.Errorf("held after DEL: %q", held)
	}
	if rules := n.rules(); strings.Contains(rules, "10.213.7.") || strings.Contains(rules, "18213") {
		t.Errorf("rules left:\n%s", rules)
	}
	for _, p := range []Pod{a, b} {
		if err := Remove(p.Netns); err != nil {
			t.Error(err)
		}
	}
}

// TestNetnsVanishedBeforeDel: a reboot, or an outsider, took the namespace.
func TestNetnsVanishedBeforeDel(t *testing.T) {
	n := newRealNode(t, realConf, "bridge", "host-local", "portmap")
	gone, plain := n.pod("gone"), n.pod("plain")
	n.onHost(func() error {
		for _, p := range []Pod{gone, plain} {
			if _, err := n.Add(t.Context(), p); err != nil {
				return err
			}
			if err := Remove(p.Netns); err != nil {
				return err
			}
		}
		return os.WriteFile(plain.Netns, nil, 0o444)
	})
	n.onHost(func() error {
		for _, p := range []Pod{gone, plain} {
			if err := n.Del(t.Context(), p); err != nil {
				return err
			}
		}
		return nil
	})
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		held := n.held() // the kernel frees the namespace's veth in the background
		if len(held) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("held after DEL: %q", held)
		}
	}
}

// TestRealChainFails: the last plugin of the chain fails after the bridge has
// made a veth and taken an address.
func TestRealChainFails(t *testing.T) {
	conf := strings.Replace(realConf, `"type":"portmap","snat":true`, `"type":"portmap","snat":true,"conditionsV4":["--no-such-option"]`, 1)
	n := newRealNode(t, conf, "bridge", "host-local", "portmap")
	pod := n.pod("a")
	pod.PortMappings = []PortMapping{{HostPort: 18214, ContainerPort: 80, Protocol: "tcp"}}
	n.onHost(func() error {
		r, err := n.Add(t.Context(), pod)
		if err == nil {
			return fmt.Errorf("Add succeeded: %v", r.IPs)
		}
		if !strings.Contains(err.Error(), "plugin portmap (ADD)") {
			t.Errorf("error: %v", err)
		}
		return nil
	})
	if held := n.held(); len(held) != 0 {
		t.Errorf("held after the failed ADD: %q", held)
	}
	if rules := n.rules(); strings.Contains(rules, "10.213.7.") || strings.Contains(rules, "18214") {
		t.Errorf("rules left:\n%s", rules)
	}
}

func TestRealBandwidth(t *testing.T) {
	n := newRealNode(t, strings.Replace(realConf, `{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`,
		`{"type":"bandwidth","capabilities":{"bandwidth":true}}`, 1), "bridge", "host-local", "bandwidth")
	var noTBF error
	n.onHost(func() error {
		dummy := &netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "probe"}}
		if noTBF = netlink.LinkAdd(dummy); noTBF == nil {
			return netlink.LinkDel(dummy)
		}
		return nil
	})
	if noTBF != nil {
		t.Skipf("needs ifb devices in the kernel: %v", noTBF)
	}
	pod := n.pod("a")
	if err := pod.ReadAnnotations(map[string]string{annotationIngress: "8M", annotationEgress: "4M"}); err != nil {
		t.Fatal(err)
	}
	rates := map[string]uint64{}
	n.onHost(func() error {
		if _, err := n.Add(t.Context(), pod); err != nil {
			return err
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			qdiscs, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				if tbf, ok := q.(*netlink.Tbf); ok {
					rates[l.Type()] = tbf.Rate * 8
				}
			}
		}
		return n.Del(t.Context(), pod)
	})
	if rates["veth"] != 8_000_000 || rates["ifb"] != 4_000_000 {
		t.Errorf("rates %v, want veth 8M (into the pod) and ifb 4M (out of it)", rates)
	}
	if held := n.held(); len(held) != 0 {
		t.Errorf("held after DEL: %q", held)
	}
}

func checkEth0(t *testing.T, netns string, r Result, mac string) {
	t.Helper()
	err := Do(netns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if mac != "" && link.Attrs().HardwareAddr.String() != mac {
			t.Errorf("eth0 has MAC %s, want %s", link.Attrs().HardwareAddr, mac)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		var have []string
		for _, a := range addrs {
			have = append(have, a.IP.String())
		}
		for _, ip := range r.IPs {
			if !strings.Contains(strings.Join(have, " "), ip.String()) {
				t.Errorf("eth0 has %v, the result says %s", have, ip)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// serve answers "hello" to every connection in a namespace.
func serve(t *testing.T, netns, port string) {
	t.Helper()
	var l net.Listener
	if err := Do(netns, func() (err error) {
		l, err = net.Listen("tcp", ":"+port)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello")
			c.Close()
		}
	}()
}

func fetch(t *testing.T, netns, addr string) string {
	t.Helper()
	conn, err := dialOne(t.Context(), netns, addr)
	if err != nil {
		t.Errorf("dial %s: %v", addr, err)
		return ""
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}
