package host

import (
	"fmt"
	"os/exec"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/apparmor"

	"github.com/podshim/podshim/internal/spec"
)

// appArmorParser loads profiles into the kernel; it comes with AppArmor's user space.
const appArmorParser = "apparmor_parser"

// loading keeps a burst of new containers from loading the same profile many times.
var loading sync.Mutex

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
	loading.Lock()
	defer loading.Unlock()
	if loaded, err := apparmor.IsLoaded(profile); err == nil && loaded {
		return nil // by the one before
	}
	if err := apparmor.InstallDefault(profile); err != nil {
		return fmt.Errorf("load profile %q: %w", profile, err)
	}
	return nil
}

// hasAppArmorParser tells why the default profile cannot be loaded, if so.
func hasAppArmorParser() error {
	if _, err := exec.LookPath(appArmorParser); err != nil {
		return fmt.Errorf("%w: install AppArmor's user space (Debian's package apparmor)", err)
	}
	return nil
}
