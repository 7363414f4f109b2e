package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/private"
)

// containerd is the peer that the suite's time is compared with. It gets the
// same network and images as podshim.
type containerd struct {
	cmd  *exec.Cmd
	done chan error
}

// startContainerd writes a configuration into the place and starts containerd
// on the place's socket.
func startContainerd(ctx context.Context, o options, place *private.Place, c private.Config) (*containerd, error) {
	for _, dir := range []string{"run", "cni", "ipam", "tmp"} {
		if err := os.MkdirAll(place.Path(dir), 0o755); err != nil {
			return nil, fmt.Errorf("configure containerd: %w", err)
		}
	}
	if err := os.WriteFile(place.Path("cni", "10-private.conflist"), []byte(place.Conflist(c)), 0o644); err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	config := fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = %q
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.9"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %q
`, place.Path("root"), place.Path("state"), place.Socket(), place.Path("run", "ttrpc.sock"),
		c.Plugins, place.Path("cni"), place.Certs())
	if err := os.WriteFile(place.Path("containerd.toml"), []byte(config), 0o644); err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	cmd := exec.Command(filepath.Join(o.peers, "containerd"), "--config", place.Path("containerd.toml"))
	cmd.Env = append(os.Environ(), "PATH="+o.peers+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	d := &containerd{cmd: cmd, done: make(chan error, 1)}
	go func() { d.done <- cmd.Wait() }()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if conn, err := net.Dial("unix", place.Socket()); err == nil {
			return d, conn.Close()
		}
	}
	_ = d.Kill()
	return nil, fmt.Errorf("containerd does not serve on %s", place.Socket())
}

// PID of containerd.
func (d *containerd) PID() int { return d.cmd.Process.Pid }

// Stop ends containerd; it always reports being terminated.
func (d *containerd) Stop() error {
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil {
		return fmt.Errorf("stop containerd: %w", err)
	}
	<-d.done
	return nil
}

// Kill ends containerd at once.
func (d *containerd) Kill() error {
	if err := d.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill containerd: %w", err)
	}
	<-d.done
	return nil
}
