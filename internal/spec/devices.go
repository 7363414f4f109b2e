package spec

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// fullAccess is read, write and mknod.
const fullAccess = "rwm"

// containerDevices are the nodes to make and the cgroup's rules: nothing is
// allowed but what follows, to which the OCI runtime adds its short list (null,
// zero, full, random, urandom, tty, ptmx, pts, and mknod of anything). A
// privileged container has every device of the host, and may use all.
func containerDevices(c Container) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup) {
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: fullAccess}}
	var nodes []specs.LinuxDevice
	if privileged(c.Config) {
		rules = []specs.LinuxDeviceCgroup{{Allow: true, Access: fullAccess}}
		if !c.Handler.PrivilegedWithoutHostDevices {
			nodes = slices.Clone(c.Host.Devices)
		}
	}
	for _, d := range c.Devices {
		nodes = slices.DeleteFunc(nodes, func(n specs.LinuxDevice) bool { return n.Path == d.Path })
		nodes = append(nodes, d.LinuxDevice)
		if !privileged(c.Config) {
			major, minor := d.Major, d.Minor
			rules = append(rules, specs.LinuxDeviceCgroup{
				Allow: true, Type: d.Type, Major: &major, Minor: &minor, Access: firstOf(d.Access, fullAccess),
			})
		}
	}
	return nodes, rules
}
