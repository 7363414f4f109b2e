// Package private runs a podshim of one's own: everything it has on the
// machine (directories, socket, network, cgroup) is below one directory or
// carries one name, so that it disturbs nobody and leaks can be told from
// other people's things. The critest runner and the demo use it.
package private

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/machine"
)

// Config says how the daemon is to be run.
type Config struct {
	// Podshim is the daemon's executable; podmon lies beside it.
	Podshim string
	// Plugins is the directory of the CNI plugins.
	Plugins string
	// Subnet of the pods, IPv4 CIDR; its bridge gets a generated name.
	Subnet string
	// PortMappings chains the portmap plugin, which needs iptables.
	PortMappings bool
	// InfraImage is infra_image of the configuration; empty for the embedded
	// pause program.
	InfraImage string
	// Handlers are names of runtime handlers beside the default one.
	Handlers []string
	// Log receives the daemon's standard error.
	Log io.Writer
	// LogLevel of the daemon; "info" if empty.
	LogLevel string
}

// Place is where one daemon keeps its things.
type Place struct {
	// Dir is the directory of everything.
	Dir string
	// Name is unique on this machine and part of all names that are not
	// below Dir.
	Name string
}

// NewPlace makes a directory under the system's one for temporary files. Give
// it back with Remove.
func NewPlace(prefix string) (*Place, error) {
	raw := make([]byte, 3)
	rand.Read(raw)
	name := prefix + "-" + hex.EncodeToString(raw)
	dir := filepath.Join(os.TempDir(), name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make place for podshim: %w", err)
	}
	return &Place{Dir: dir, Name: name}, nil
}

// Path is a path below the place.
func (p *Place) Path(elem ...string) string {
	return filepath.Join(append([]string{p.Dir}, elem...)...)
}

// Certs is the certs.d directory that the daemon reads.
func (p *Place) Certs() string { return p.Path("certs.d") }

// Socket is where CRI is served.
func (p *Place) Socket() string { return p.Path("run", "podshim.sock") }

// Endpoint is the socket as CRI clients want it.
func (p *Place) Endpoint() string { return "unix://" + p.Socket() }

// Bridge is the pods' bridge; a link's name has at most 15 bytes.
func (p *Place) Bridge() string { return "ps" + p.Name[len(p.Name)-6:] }

// CgroupParent of pods that come without one.
func (p *Place) CgroupParent() string { return "/" + p.Name }

// Reservations is the directory of host-local's IP files.
func (p *Place) Reservations() string { return p.Path("ipam") }

// Scope is what the machine may hold on behalf of the daemon's pods; parent is
// the process that started the daemon, see machine.Scope.
func (p *Place) Scope(parent int) machine.Scope {
	return machine.Scope{
		Parent: parent, Dir: p.Dir, NetnsDir: p.Path("netns"), Bridge: p.Bridge(),
		CgroupParent: p.CgroupParent(),
		Files:        []string{p.Reservations(), p.Path("cni-cache")},
		// host-local keeps its lock and where to go on counting.
		Ignore: func(path string) bool {
			base := filepath.Base(path)
			return base == "lock" || strings.HasPrefix(base, "last_reserved_ip") || base == p.Name
		},
	}
}

// Remove deletes the bridge, the cgroups and the directory. The daemon must
// have stopped. After a run that went wrong it also takes away mounts, for what
// is below a mount is not ours to delete.
func (p *Place) Remove() error {
	var errs []error
	if link, err := netlink.LinkByName(p.Bridge()); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	errs = append(errs, p.removeCgroups())
	if err := p.unmount(); err != nil {
		return errors.Join(append(errs, err)...)
	}
	return errors.Join(append(errs, os.RemoveAll(p.Dir))...)
}

// removeCgroups removes the place's cgroups in every hierarchy, the inner ones
// first.
func (p *Place) removeCgroups() error {
	roots, err := machine.CgroupRoots()
	errs := []error{err}
	for _, root := range roots {
		var dirs []string
		err := filepath.WalkDir(filepath.Join(root, p.CgroupParent()), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // the gone is what is wanted
		})
		errs = append(errs, err)
		for _, dir := range slices.Backward(dirs) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			}
		}
	}
	return errors.Join(errs...)
}

// unmount takes away every mount below the place, the latest first.
func (p *Place) unmount() error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(p.Dir))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// Daemon is a podshim that runs.
type Daemon struct {
	Place *Place
	cmd   *exec.Cmd
	done  chan struct{}
	err   error
}

// Start writes the daemon's configuration into the place, starts it and waits
// until it answers on its socket.
func (p *Place) Start(ctx context.Context, c Config) (*Daemon, error) {
	if err := p.write(c); err != nil {
		return nil, fmt.Errorf("configure podshim: %w", err)
	}
	cmd := exec.Command(c.Podshim, "--config", p.Path("config.toml"))
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	// Ctrl-C is for the caller, who stops the daemon in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start podshim: %w", err)
	}
	d := &Daemon{Place: p, cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	if err := d.awaitSocket(ctx); err != nil {
		return nil, errors.Join(err, d.Kill())
	}
	return d, nil
}

// Monitors are the pids of the podmons that serve the place. They outlive the
// daemon by design, and are ended by KillMonitors.
func (p *Place) Monitors() []int {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil
	}
	var pids []int
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // gone meanwhile
		}
		args := strings.Split(string(text), "\x00")
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil && len(args) > 2 && args[1] == "serve" && strings.HasPrefix(args[2], p.Path("run")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// KillMonitors ends the place's podmons; they take no gentler signal. To be
// called when they hold no container any more.
func (p *Place) KillMonitors() error {
	var errs []error
	for _, pid := range p.Monitors() {
		errs = append(errs, machine.Kill(pid, 10*time.Second))
	}
	return errors.Join(errs...)
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// awaitSocket waits until something accepts on the socket, at most 30 s.
func (d *Daemon) awaitSocket(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", d.Place.Socket())
		if err == nil {
			return conn.Close()
		}
		select {
		case <-tick.C:
		case <-d.done:
			return fmt.Errorf("podshim ended before it served: %w", d.err)
		case <-ctx.Done():
			return fmt.Errorf("podshim does not serve on %s: %w", d.Place.Socket(), ctx.Err())
		}
	}
}

// Stop asks the daemon to end and waits for it, at most 30 s; then it is
// killed, which is an error. Containers outlive it: remove pods first.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop podshim: %w", err)
	}
	select {
	case <-d.done:
		if d.err != nil {
			return fmt.Errorf("podshim ended: %w", d.err)
		}
		return nil
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("podshim did not stop in 30 s"), d.Kill())
	}
}

// Kill ends the daemon at once.
func (d *Daemon) Kill() error {
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill podshim: %w", err)
	}
	<-d.done
	return nil
}

// write makes the configuration of daemon and network.
func (p *Place) write(c Config) error {
	for _, dir := range []string{"root", "run", "cni", "netns", "ipam", "certs.d", "tmp"} {
		if err := os.MkdirAll(p.Path(dir), 0o755); err != nil {
			return err
		}
	}
	level := c.LogLevel
	if level == "" {
		level = "info"
	}
	config := fmt.Sprintf(`root = %q
run = %q

[log]
level = %q

[cri]
socket = %q

[cgroup]
driver = "cgroupfs"
parent = %q

[network]
conf_dir = %q
bin_dirs = [%q]
netns_dir = %q

[image]
certs_dirs = [%q]
infra_image = %q
`, p.Path("root"), p.Path("run"), level, p.Socket(), p.CgroupParent(), p.Path("cni"), c.Plugins,
		p.Path("netns"), p.Certs(), c.InfraImage)
	for _, handler := range c.Handlers {
		config += fmt.Sprintf("\n[runtime.handlers.%s]\nnofile_soft = 65536\n", handler)
	}
	if err := os.WriteFile(p.Path("config.toml"), []byte(config), 0o644); err != nil {
		return err
	}
	return os.WriteFile(p.Path("cni", "10-private.conflist"), []byte(p.Conflist(c)), 0o644)
}

// Conflist is the pods' network: a bridge of their own without access to the
// outside, addresses from host-local.
func (p *Place) Conflist(c Config) string {
	portmap := ""
	if c.PortMappings {
		portmap = `,
    {"type": "portmap", "capabilities": {"portMappings": true}}`
	}
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": %q,
  "plugins": [
    {
      "type": "bridge",
      "bridge": %q,
      "isGateway": true,
      "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
    }%s
  ]
}
`, p.Name, p.Bridge(), p.Reservations(), c.Subnet, portmap)
}
