package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/apparmor"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/spec"
)

const (
	// appArmorParser loads profiles into the kernel; it comes with AppArmor's user space.
	appArmorParser = "apparmor_parser"
	// parserLimit is a hundred times what it takes.
	parserLimit = 30 * time.Second
)

// loading keeps a burst of new containers from loading the same profile many times.
var loading singleflight.Group

// LoadedAppArmor returns nil when the kernel has the profile. The default one is
// loaded if it is not there, also when somebody has removed it since; every other
// one is the operator's to load. It is what spec.Container.LoadedAppArmor wants.
func LoadedAppArmor(profile string) error {
	loaded, err := apparmor.IsLoaded(profile)
	switch {
	case err != nil:
		return fmt.Errorf("look for profile %q: %w", profile, err)
	case loaded:
		return nil
	case profile != spec.DefaultAppArmor:
		return fmt.Errorf("profile %q is not loaded on this machine; load it with %s -r FILE: %w", profile, appArmorParser, errdefs.ErrFailedPrecondition)
	}
	_, err, _ = loading.Do(profile, func() (any, error) { return nil, loadProfile(profile, parserLimit) })
	return err
}

// loadProfile loads the default profile under a name. A parser that has not ended by
// the limit is killed: creating containers waits for it.
func loadProfile(name string, limit time.Duration) error {
	ended := make(chan error, 1)
	go func() { ended <- apparmor.InstallDefault(name) }()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("load profile %q: %w", name, err)
		}
		return nil
	case <-timer.C:
		killParsers()
		return fmt.Errorf("load profile %q: %s did not end within %v and was killed: %w", name, appArmorParser, limit, errdefs.ErrUnavailable)
	}
}

// killParsers kills what this process runs as the parser: the library that starts it
// takes no context. A process is held by a descriptor before it is looked at, so that
// it is not another one that got its PID.
func killParsers() {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, list := range lists {
		children, _ := os.ReadFile(list)
		for _, child := range strings.Fields(string(children)) {
			pid, err := strconv.Atoi(child)
			if err != nil {
				continue
			}
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			stat, _ := os.ReadFile(filepath.Join("/proc", child, "stat"))
			if strings.HasPrefix(string(stat), child+" ("+appArmorParser+") ") {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			unix.Close(fd)
		}
	}
}

// hasAppArmorParser tells why the default profile cannot be loaded, if so.
func hasAppArmorParser() error {
	if _, err := exec.LookPath(appArmorParser); err != nil {
		return fmt.Errorf("%w: install AppArmor's user space (Debian's package apparmor)", err)
	}
	return nil
}
