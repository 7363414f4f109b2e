package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// rebindLimit is how long a podmon may take to bind its socket again after somebody has
// emptied the run directory. It does so at once.
const rebindLimit = 10 * time.Second

// findPodmons lists the podmons of a run directory that run, by instance, as the kernel
// knows them: their files may be gone. They are of this user and of this mount
// namespace, so that neither a container nor another user of the machine can pass for one.
func findPodmons(runDir string) (map[string]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	self, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	found := make(map[string]Process)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		args := strings.Split(string(raw), "\x00")
		if err != nil || len(args) < 5 || args[0] != "podmon" || args[1] != "serve" || args[2] != runDir {
			continue
		}
		var owner unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &owner); err != nil || int(owner.Uid) != os.Geteuid() {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err != nil || ns != self {
			continue
		}
		if p, err := wire.Identify(pid); err == nil && p.Alive() {
			found[args[3]] = p
		}
	}
	return found, nil
}

// awaitSocket returns when the podmon that is to listen in dir does so, or at once when
// it has ended.
func awaitSocket(ctx context.Context, dir string, p Process) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watch.Close()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := watch.Add(dir); err != nil {
		return err
	}
	limit := time.NewTimer(rebindLimit)
	defer limit.Stop()
	look := time.NewTicker(100 * time.Millisecond) // for its end
	defer look.Stop()
	for {
		if _, err := os.Stat(filepath.Join(dir, "sock")); err == nil || !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if !p.Alive() {
			return nil
		}
		select {
		case <-watch.Events:
		case err := <-watch.Errors:
			return err
		case <-look.C:
		case <-limit.C:
			return fmt.Errorf("podmon %d does not bind its socket again in %s", p.PID, dir)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
