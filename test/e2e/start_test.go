package e2e

import (
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/podshim/podshim/test/harness"
)

// P8: init containers one by one to their end; the web server then serves what the
// first of them left.
func testInit(t *testing.T, k *Kubelet) {
	p := k.Run("init")
	status := p.WaitReady()
	if log := p.WaitLog("check", "sample"); !strings.HasPrefix(log, "sample application\n") && !strings.Contains(log, "\nsample application\n") {
		t.Errorf("the web server served %q", log)
	}
	war, second := status.Container("war").State.Terminated, status.Container("second").State.Terminated
	if war == nil || second == nil || war.ExitCode != 0 || second.ExitCode != 0 || war.Reason != "Completed" {
		t.Fatalf("init containers have not ended well:\n%v", status)
	}
	web := status.Container("web").State.Running
	if second.StartedAt.Before(war.FinishedAt) || web.StartedAt.Before(second.FinishedAt) {
		t.Errorf("war ended %v, second ran from %v to %v, web began %v; want one after the other",
			war.FinishedAt, second.StartedAt, second.FinishedAt, web.StartedAt)
	}
	for _, name := range []string{"war", "second"} {
		if left := processesOf(status.Container(name).ID()); len(left) != 0 {
			t.Errorf("init container %s has ended and left %v", name, left)
		}
	}
}

// A failing init container is tried again and holds the pod back.
func testInitRetry(t *testing.T, k *Kubelet) {
	p := k.Run("init-retry")
	failed := p.Wait("failing in its init container", func(s PodStatus) bool { return s.Container("flaky").RestartCount > 0 })
	if app := failed.Container("app"); app.State.Running != nil || app.ID() != "" {
		t.Errorf("the app was started before its init container has ended well: %v", failed)
	}
	status := p.WaitReady()
	if c := status.Container("flaky"); c.RestartCount != 2 || c.State.Terminated == nil || c.State.Terminated.ExitCode != 0 {
		t.Errorf("init container is %v, want it to succeed at the third try", c)
	}
	p.WaitLog("app", "3\n")
}

// A restartable init container starts before the app, is restarted on its own, and
// stops after the app.
func testNativeSidecar(t *testing.T, k *Kubelet) {
	p := k.Run("native-sidecar", "spec:\n", "spec:\n  terminationGracePeriodSeconds: 30\n")
	status := p.WaitReady()
	p.WaitLog("app", "up\n") // what the sidecar had left before the app began
	sidecar, app := status.Container("sidecar"), status.Container("app")
	if sidecar.State.Running == nil || app.State.Running.StartedAt.Before(sidecar.State.Running.StartedAt) {
		t.Errorf("sidecar and app are\n%v", status)
	}

	if err := p.Process("sidecar").Kill(sigkill); err != nil {
		t.Fatal(err)
	}
	p.Wait("with its sidecar restarted", func(s PodStatus) bool {
		return s.Container("sidecar").RestartCount == 1 && s.Container("sidecar").State.Running != nil
	})
	status = p.WaitReady()
	if now := status.Container("app"); now.ID() != app.ID() || now.RestartCount != 0 {
		t.Errorf("the app did not outlive its sidecar: %v", now)
	}

	appLog, sidecarLog := p.logFile("app"), p.logFile("sidecar")
	p.Remove()
	appStops, sidecarStops := timeOf(k.lastLines(appLog), "app stops"), timeOf(k.lastLines(sidecarLog), "sidecar stops")
	// The app takes two seconds more to end. Told at the same time, both would speak at once.
	if appStops.IsZero() || sidecarStops.Sub(appStops) < time.Second {
		t.Errorf("the app was told to stop at %v, the sidecar at %v; want it told when the app has ended", appStops, sidecarStops)
	}
}

// timeOf is when a line was written.
func timeOf(lines []harness.LogLine, text string) (at time.Time) {
	for _, line := range lines {
		if line.Text == text {
			at = line.Time
		}
	}
	return at
}

// P9: the app's lines come out of the sidecar, all of them and in order.
func testLogSidecar(t *testing.T, k *Kubelet) {
	p := k.Run("log-sidecar")
	p.WaitReady()
	log := p.WaitLog("forwarder", "request 5\n")
	var want strings.Builder
	for n := range strings.Count(log, "\n") {
		fmt.Fprintf(&want, "request %d\n", n+1)
	}
	if log != want.String() {
		t.Errorf("the sidecar forwarded %q", log)
	}
	if app := p.Logs("app"); app != "" {
		t.Errorf("the app's own log holds %q", app)
	}
	stamped := p.Logs("forwarder", "timestamps=true", "tailLines=1")
	if at, _, _ := strings.Cut(stamped, " "); !isTime(at) || strings.Count(stamped, "\n") != 1 {
		t.Errorf("one line with its time is %q", stamped)
	}
}

func isTime(s string) bool {
	_, err := time.Parse(time.RFC3339Nano, s)
	return err == nil
}

// P10: an init container changes the pod's network and nobody else's.
func testNetworkSidecar(t *testing.T, k *Kubelet) {
	p := k.Run("network-sidecar")
	p.WaitReady()
	p.WaitLog("app", "answered by the proxy\n")
	if addrs := p.Exec("app", "ip", "addr"); !strings.Contains(addrs, "10.111.0.1/32") {
		t.Errorf("the pod's devices are\n%s", addrs)
	}
	if host := self(t).Read("net/fib_trie"); strings.Contains(host, "10.111.0.1") {
		t.Error("the host has the pod's address")
	}
	if out, err := p.TryExec("app", "ip", "link", "set", "lo", "down"); err == nil {
		t.Errorf("the app may change the network as well: %q", out)
	}
}

// P10: as a service mesh does it. The rule is the pod's and nobody else's.
func testRedirectSidecar(t *testing.T, k *Kubelet) {
	host := redirections(t, self(t))
	p := k.Run("redirect-sidecar")
	p.WaitReady()
	p.WaitLog("app", "answered by the proxy\n")
	if out, err := p.TryExec("app", "wget", "-q", "-O", "-", "http://192.0.2.77:4242/"); err != nil || out != "answered by the proxy\n" {
		t.Errorf("any other destination answers %q, %v", out, err)
	}
	// Who asks as the proxy does is not sent to the proxy: the destination is nowhere.
	if out, err := p.TryExec("proxy", "wget", "-q", "-T", "1", "-O", "-", "http://192.0.2.77:4242/"); err == nil {
		t.Errorf("the proxy's own connection was answered %q", out)
	}
	infra, _ := p.Infra()
	if rules := redirections(t, infra); !strings.Contains(rules, "--uid-owner 1337 -j REDIRECT --to-ports 15001") {
		t.Errorf("infra's network namespace has no rule of the init container's:\n%s", rules)
	}
	if now := redirections(t, self(t)); now != host {
		t.Errorf("the host had\n%s\nand has\n%s", host, now)
	}
}

// redirections are the rules of a process's network namespace that send connections
// elsewhere as redirect-sidecar's does, by iptables and by nftables itself. Other pods'
// host ports make rules too, of other kinds.
func redirections(t *testing.T, p harness.Process) string {
	t.Helper()
	var found strings.Builder
	for _, list := range [][]string{{"iptables-save"}, {"nft", "--stateless", "list", "ruleset"}} {
		out, err := exec.Command("nsenter", append([]string{"--net=" + p.Path("ns/net"), "--"}, list...)...).Output()
		if err != nil {
			t.Fatalf("%q in the network namespace of %v: %v", list, p, err)
		}
		for line := range strings.Lines(string(out)) {
			if redirection.MatchString(line) {
				found.WriteString(line)
			}
		}
	}
	return found.String()
}

var redirection = regexp.MustCompile(`(?i)redirect|15001|uid-owner|skuid`)

// P4, P13: the life of the pod is that of its infra container.
func testLifetimes(t *testing.T, k *Kubelet) {
	p := k.Run("lifetimes")
	before := p.Wait("crashing in one container", func(s PodStatus) bool {
		c := s.Container("crashing")
		return c.RestartCount > 0 && c.LastState.Terminated != nil && s.Container("steady").State.Running != nil
	})
	if end := before.Container("crashing").LastState.Terminated; end.ExitCode != 3 || end.Reason != "Error" {
		t.Errorf("the crash is %d %s, want 3 Error", end.ExitCode, end.Reason)
	}
	// kubelet looks at a pod again when the back-off is over: the state is CrashLoopBackOff
	// for the moment before the next start only, but its log has it.
	backedOff := regexp.MustCompile(`CrashLoopBackOff.*container=crashing pod=` + regexp.QuoteMeta(p.Name) + `-`)
	p.Wait("held back before the next try", func(PodStatus) bool { return backedOff.MatchString(k.Log()) })
	// While kubelet has removed an instance and not seen the next one's end there is none.
	if log := p.WaitLog("crashing", "giving up\n", "previous=true"); log != "giving up\n" {
		t.Errorf("log of the instance before is %q", log)
	}
	infra, sandbox := p.Infra()
	steady := p.Process("steady")

	if err := steady.Kill(sigkill); err != nil {
		t.Fatal(err)
	}
	after := p.Wait("running again after its container was killed", func(s PodStatus) bool {
		c := s.Container("steady")
		return c.RestartCount == 1 && c.State.Running != nil
	})
	if end := after.Container("steady").LastState.Terminated; end == nil || end.ExitCode != 137 {
		t.Errorf("the killed container is %v, want exit code 137", after.Container("steady"))
	}
	if after.Status.PodIP != before.Status.PodIP || p.Sandbox() != sandbox || !infra.Alive() {
		t.Errorf("IP %s became %s, sandbox %s became %s, infra alive %v; want all as before",
			before.Status.PodIP, after.Status.PodIP, sandbox, p.Sandbox(), infra.Alive())
	}
	if now := p.Process("steady"); now.Namespace("net") != infra.Namespace("net") || now.PID == steady.PID {
		t.Errorf("restarted %v has not joined infra %v", now, infra)
	}

	old := p.Process("steady")
	if err := infra.Kill(sigkill); err != nil {
		t.Fatal(err)
	}
	p.Wait("rebuilt after its infra container was killed", func(s PodStatus) bool {
		c := s.Container("steady")
		return c.RestartCount == 2 && c.State.Running != nil
	})
	now, newSandbox := p.Infra()
	if newSandbox == sandbox || now.PID == infra.PID {
		t.Errorf("sandbox %s is not a new one", newSandbox)
	}
	if err := old.WaitGone(harness.Limit); err != nil {
		t.Errorf("a container has outlived its pod's infra: %v", err)
	}
	if p.Process("steady").Namespace("net") != now.Namespace("net") {
		t.Error("the rebuilt pod's container is not in its infra's network namespace")
	}
	p.Exec("steady", "ip", "addr", "show", "eth0")
}
