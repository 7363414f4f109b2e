package spec

import (
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DefaultCapabilities are those of a container whose handler names none, the
// set Docker and containerd give.
var DefaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID",
	"CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP",
	"CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// allCapabilities means every capability in add, drop and ambient lists.
const allCapabilities = "ALL"

// containerCapabilities are the sets of a container's process, each sorted.
//
// ALL is applied before single names, and add before drop, so that "add ALL,
// drop CHOWN" and "drop ALL, add CHOWN" both mean what they say. The sets never
// hold what the runtime itself lacks: defaults, ALL and privileged are cut down
// to it, a capability asked for by name that the runtime lacks is an error
// (containerd lets such a container fail at its start).
//
// Inheritable is empty but for ambient capabilities, which the kernel demands
// there: see CVE-2022-24769.
func containerCapabilities(sc *runtime.LinuxContainerSecurityContext, h Handler, host Host) (*specs.LinuxCapabilities, error) {
	const field = "linux.security_context.capabilities"
	c := sc.GetCapabilities()
	base := h.DefaultCapabilities
	if base == nil {
		base = DefaultCapabilities
	}
	add, addAll, err := capabilityNames(field+".add_capabilities", c.GetAddCapabilities())
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := capabilityNames(field+".drop_capabilities", c.GetDropCapabilities())
	if err != nil {
		return nil, err
	}
	ambient, ambientAll, err := capabilityNames(field+".add_ambient_capabilities", c.GetAddAmbientCapabilities())
	if err != nil {
		return nil, err
	}
	if err := hostHas(field+".add_capabilities", add, host); err != nil {
		return nil, err
	}
	if err := hostHas(field+".add_ambient_capabilities", ambient, host); err != nil {
		return nil, err
	}
	if ambientAll {
		ambient = slices.Clone(host.Capabilities)
	}
	switch {
	case sc.GetPrivileged():
		base, drop = host.Capabilities, nil
	case dropAll:
		base = nil
	case addAll:
		base = host.Capabilities
	}
	set := without(slices.Concat(base, add, ambient), drop)
	set = slices.DeleteFunc(set, func(name string) bool { return !slices.Contains(host.Capabilities, name) })
	ambient = without(ambient, drop)
	return &specs.LinuxCapabilities{
		Bounding: set, Permitted: slices.Clone(set), Effective: slices.Clone(set),
		Inheritable: ambient, Ambient: slices.Clone(ambient),
	}, nil
}

// capabilityNames gives CRI names ("chown", "NET_ADMIN", and "CAP_" ones for
// those who write it) the kernel's form, and tells whether ALL was among them.
func capabilityNames(field string, in []string) (names []string, all bool, err error) {
	for i, raw := range in {
		name := strings.ToUpper(raw)
		if name == allCapabilities {
			all = true
			continue
		}
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		if !knownCapabilities[name] {
			return nil, false, invalid(field, "entry %d: %q is no capability", i, raw)
		}
		names = append(names, name)
	}
	return names, all, nil
}

// hostHas refuses names that the runtime cannot give away.
func hostHas(field string, names []string, host Host) error {
	for _, name := range names {
		if !slices.Contains(host.Capabilities, name) {
			return unable(field, "the runtime itself has no %s", name)
		}
	}
	return nil
}

// without returns names sorted, without repetition and without those dropped.
func without(names, drop []string) []string {
	out := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return slices.Contains(drop, name) })
	slices.Sort(out)
	return slices.Compact(out)
}

// knownCapabilities are all names the kernel has ever given out.
var knownCapabilities = func() map[string]bool {
	known := make(map[string]bool)
	for _, c := range capability.ListKnown() {
		known["CAP_"+strings.ToUpper(c.String())] = true
	}
	return known
}()
