// Package host reads from the machine what a container's description must know
// of it: which capabilities, cgroups and mounts there are to give (Facts), and
// what the host paths of one config are (Sources, Devices).
//
// A fact that cannot be read is not an error: the machine counts as unable, and
// the Fact says why, for `podshim check` to show. What is probed is probed by
// doing it, on something nobody else sees.
package host

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/spec"
)

// Options are the choices an operator has.
type Options struct {
	// CgroupDriver is "cgroupfs", "systemd", or empty to find out.
	CgroupDriver string
	// Dir lies on the file system that container roots are on; whether mounts
	// can be id-mapped depends on it. Empty is the temporary directory.
	Dir string
}

// Fact is one thing that was found, for people.
type Fact struct {
	Name  string // of the field in spec.Host
	Value string
	// Why tells where the value comes from, and for a lack what is missing.
	Why string
}

// Facts reads the machine once. Facts are in the order of spec.Host's fields.
// The error tells of options that this machine cannot fulfil, or of a machine
// without cgroups: nothing can be run there.
func Facts(o Options) (spec.Host, []Fact, error) {
	r := &reader{}
	r.hostname()
	r.capabilities()
	r.security()
	if err := r.cgroups(o.CgroupDriver); err != nil {
		return spec.Host{}, r.facts, err
	}
	r.limits()
	r.mounts(o.Dir)
	r.rest()
	return r.host, r.facts, nil
}

// reader gathers a Host and the facts behind it.
type reader struct {
	host  spec.Host
	facts []Fact
}

func (r *reader) say(name string, value any, why string, args ...any) {
	r.facts = append(r.facts, Fact{Name: name, Value: fmt.Sprint(value), Why: fmt.Sprintf(why, args...)})
}

func (r *reader) hostname() {
	name, err := os.Hostname()
	r.host.Hostname = name
	r.say("Hostname", name, "%s", because(err, "uname"))
}

// capabilities: a container can be given what is in the bounding set and held
// (permitted) as well.
func (r *reader) capabilities() {
	c, err := capability.NewPid2(0)
	if err == nil {
		err = c.Load()
	}
	if err != nil {
		r.say("Capabilities", "none", "cannot be read: %v", err)
		return
	}
	last, err := capability.LastCap()
	if err != nil {
		last = capability.CAP_AUDIT_READ // older than any kernel that runs podshim
	}
	var missing []string
	for _, known := range capability.ListKnown() {
		name := "CAP_" + strings.ToUpper(known.String())
		switch {
		case known > last:
		case c.Get(capability.BOUNDING, known) && c.Get(capability.PERMITTED, known):
			r.host.Capabilities = append(r.host.Capabilities, name)
		default:
			missing = append(missing, name)
		}
	}
	why := "all the kernel has"
	if len(missing) > 0 {
		why = "without " + strings.Join(missing, ", ") + ": no container can have them"
	}
	r.say("Capabilities", len(r.host.Capabilities), "%s", why)
}

func (r *reader) security() {
	actions, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	r.host.Seccomp = err == nil
	r.say("Seccomp", r.host.Seccomp, "%s", because(err, "actions: "+strings.TrimSpace(string(actions))))

	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	on := err == nil && strings.HasPrefix(string(enabled), "Y")
	if on {
		if _, err = os.Stat("/sys/kernel/security/apparmor"); err == nil {
			err = hasAppArmorParser()
		}
	}
	r.host.AppArmor = on && err == nil
	r.say("AppArmor", r.host.AppArmor, "%s", because(err, "/sys/module/apparmor/parameters/enabled is "+strings.TrimSpace(string(enabled))))

	r.host.SELinux = selinux.GetEnabled()
	why := "selinuxfs is mounted"
	if !r.host.SELinux {
		why = "selinuxfs is not mounted"
	}
	r.say("SELinux", r.host.SELinux, "%s", why)
}

// limits: how low the OOM score and how high the nofile limit can go. With
// CAP_SYS_RESOURCE only the kernel's own bounds hold. Without it a process may
// lower its score to the lowest that a privileged parent ever gave it, which
// the kernel shows nobody; the score it has now is certainly allowed.
func (r *reader) limits() {
	raise := r.has("CAP_SYS_RESOURCE")
	if raise {
		r.host.MinOOMScoreAdj = -1000
		r.say("MinOOMScoreAdj", -1000, "CAP_SYS_RESOURCE is there")
	} else {
		own, err := readInt("/proc/self/oom_score_adj")
		r.host.MinOOMScoreAdj = int(own)
		r.say("MinOOMScoreAdj", own, "%s", because(err, "without CAP_SYS_RESOURCE nothing goes below the daemon's own"))
	}
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	r.host.NofileHard = limit.Max
	why := "the daemon's own hard limit: without CAP_SYS_RESOURCE it cannot be raised"
	if raise {
		if most, openErr := readInt("/proc/sys/fs/nr_open"); openErr == nil {
			r.host.NofileHard, err, why = uint64(most), nil, "/proc/sys/fs/nr_open"
		}
	}
	r.say("NofileHard", r.host.NofileHard, "%s", because(err, why))
}

func (r *reader) has(name string) bool {
	for _, c := range r.host.Capabilities {
		if c == name {
			return true
		}
	}
	return false
}

func (r *reader) mounts(dir string) {
	if dir == "" {
		dir = os.TempDir()
	}
	err := probeRRO()
	r.host.RRO = err == nil
	r.say("RRO", r.host.RRO, "%s", because(err, "mount_setattr(2) works recursively"))
	err = probeIDMap(dir)
	if layers, layerErr := overlayutils.SupportsIDMappedMounts(); err == nil && !layers {
		err = fmt.Errorf("overlayfs takes no id-mapped layers (Linux 5.19 does): %w", layerErr)
	}
	r.host.IDMapMounts = err == nil
	r.say("IDMapMounts", r.host.IDMapMounts, "%s", because(err, "mounts of "+dir+", and layers on it, can be id-mapped"))
}

func (r *reader) rest() {
	_, err := os.Stat("/sys/fs/resctrl/schemata")
	r.host.RDT = err == nil
	r.say("RDT", r.host.RDT, "%s", because(err, "/sys/fs/resctrl is mounted"))

	devices, err := hostDevices("/dev")
	r.host.Devices = devices
	r.say("Devices", len(devices), "%s", because(err, "/dev, for privileged containers"))

	var uts unix.Utsname
	err = unix.Uname(&uts)
	r.host.Kernel = unix.ByteSliceToString(uts.Release[:])
	r.say("Kernel", r.host.Kernel, "%s", because(err, "uname"))
}

// because is the error if there is one.
func because(err error, why string) string {
	if err != nil {
		return err.Error()
	}
	return why
}

func readInt(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

var errNoCgroups = errors.New("no cgroup hierarchy is mounted at /sys/fs/cgroup")
