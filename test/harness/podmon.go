package harness

import (
	"bytes"
	"fmt"
	"os"
	"slices"
)

// Podmons are the node's monitors that are alive, as the kernel knows them: one,
// but while one takes over from another.
func (n *Node) Podmons() []Process {
	pids := map[int]bool{}
	var all []Process
	for _, p := range n.processes() {
		if p.State != "Z" && n.isMonitor(p) {
			pids[p.PID] = true
			all = append(all, p)
		}
	}
	// What podmon has forked is its copy until it executes "podmon init".
	return slices.DeleteFunc(all, func(p Process) bool { return pids[p.Parent] })
}

// Podmon is the one there is.
func (n *Node) Podmon() Process {
	n.t.Helper()
	all := n.Podmons()
	if len(all) != 1 {
		n.t.Fatalf("monitors: %v, want one\n%s", all, n.tail(20))
	}
	return all[0]
}

// InstallPodmon makes the next start of the daemon find another build of podmon, which
// does the same: something stands behind the end of the program.
func (n *Node) InstallPodmon() {
	n.t.Helper()
	if err := n.installPodmon(); err != nil {
		n.t.Fatalf("install another podmon: %v", err)
	}
}

// SpoilPodmon makes the program that InstallPodmon has installed none that can be started,
// until mend.
func (n *Node) SpoilPodmon() (mend func()) {
	n.t.Helper()
	if n.podmon == "" {
		n.t.Fatalf("podmon is not the node's own: InstallPodmon makes it so")
	}
	whole := n.podmon + ".whole"
	err := os.Rename(n.podmon, whole)
	if err == nil {
		err = os.WriteFile(n.podmon, []byte("not a program"), 0o755)
	}
	if err != nil {
		n.t.Fatalf("spoil podmon: %v", err)
	}
	return func() {
		n.t.Helper()
		if err := os.Rename(whole, n.podmon); err != nil {
			n.t.Fatalf("mend podmon: %v", err)
		}
	}
}

func (d *daemon) installPodmon() error {
	bin, err := Binaries()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(bin + "/podmon")
	if err != nil {
		return err
	}
	installed := dir(d, "podmon-"+randomHex(4))
	if err := os.WriteFile(installed, append(program, randomHex(8)...), 0o755); err != nil {
		return err
	}
	config, err := os.ReadFile(dir(d, "config.toml"))
	if err != nil {
		return err
	}
	line := func(path string) []byte { return fmt.Appendf(nil, "binary = %q\n", path) }
	if d.podmon == "" {
		d.podmon = bin + "/podmon"
	}
	config = bytes.Replace(config, line(d.podmon), line(installed), 1)
	d.podmon = installed
	return os.WriteFile(dir(d, "config.toml"), config, 0o600)
}
