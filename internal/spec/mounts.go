package spec

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// podFileOptions keep the flags of the file systems that the pod's files lie
// on: inside a user namespace a mount that would clear them is refused (EPERM).
var podFileOptions = []string{"rbind", "rprivate", "nosuid", "nodev", "noexec"}

// containerMounts are a container's mounts in the order they are made, and the
// propagation its root needs for them.
//
// The defaults come first; then the pod's files, the caller's volumes and the
// config's mounts, shallow destinations before deep ones so that none hides
// another. At one destination the config wins over all, and a volume over the
// pod's files; a mount at /dev replaces everything below it as well.
func containerMounts(c Container) (mounts []specs.Mount, propagation string, err error) {
	wanted := make(map[string]specs.Mount)
	for _, m := range podFiles(c) {
		wanted[m.Destination] = m
	}
	volumes := make(map[string]specs.Mount)
	for _, m := range c.Volumes {
		m.Destination = path.Clean(m.Destination)
		volumes[m.Destination], wanted[m.Destination] = m, m
	}
	for i, m := range c.Config.GetMounts() {
		field := fmt.Sprintf("mounts[%d]", i)
		oci, err := configMount(field, m, volumes, c)
		if err != nil {
			return nil, "", err
		}
		wanted[oci.Destination] = oci
		propagation = widest(propagation, m.GetPropagation())
	}
	for _, m := range defaultMounts(c) {
		if _, taken := wanted[m.Destination]; taken {
			continue
		}
		if _, dev := wanted["/dev"]; dev && strings.HasPrefix(m.Destination, "/dev/") {
			continue
		}
		mounts = append(mounts, m)
	}
	return append(mounts, byDepth(wanted)...), propagation, nil
}

// byDepth sorts mounts by the number of elements in their destination, then by name.
func byDepth(wanted map[string]specs.Mount) []specs.Mount {
	out := make([]specs.Mount, 0, len(wanted))
	for _, m := range wanted {
		out = append(out, m)
	}
	depth := func(m specs.Mount) int {
		if m.Destination == "/" {
			return 0
		}
		return strings.Count(m.Destination, "/")
	}
	slices.SortFunc(out, func(a, b specs.Mount) int {
		return cmp.Or(cmp.Compare(depth(a), depth(b)), strings.Compare(a.Destination, b.Destination))
	})
	return out
}

// KernelMounts are the file systems without which no program of an image can be
// expected to run: the mounts of an infra_image.
func KernelMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs",
			Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	}
}

// defaultMounts are the kernel file systems every container has.
func defaultMounts(c Container) []specs.Mount {
	mounts := append(KernelMounts(), []specs.Mount{
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		sysfs(c),
	}...)
	access := "ro"
	if privileged(c.Config) || (c.Handler.CgroupWritable && ownCgroupns(c)) {
		access = "rw"
	}
	options := []string{"nosuid", "noexec", "nodev", "relatime", access}
	if !ownCgroupns(c) {
		options = append(options, c.Host.CgroupMountOptions...)
	}
	return append(mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: options})
}

// sysfs is a sysfs of the pod's network namespace, writable for a privileged
// container. The kernel lets a user namespace mount sysfs only with a network
// namespace it owns, so a pod with a user namespace on the host's network gets
// the host's /sys, read-only all the way down.
func sysfs(c Container) specs.Mount {
	if c.Pod.User != "" && c.Pod.Netns == "" {
		return specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys",
			Options: []string{"rbind", "rro", "nosuid", "noexec", "nodev"}}
	}
	access := "ro"
	if privileged(c.Config) {
		access = "rw"
	}
	return specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs",
		Options: []string{"nosuid", "noexec", "nodev", access}}
}

// podFiles are the pod's /dev/shm, /etc/resolv.conf, /etc/hostname and /etc/hosts.
// The files are writable, as in Docker, unless the container's root is read-only.
// kubelet brings its own /etc/hosts, as a mount of the config, which wins.
func podFiles(c Container) []specs.Mount {
	access := "rw"
	if c.Config.GetLinux().GetSecurityContext().GetReadonlyRootfs() {
		access = "ro"
	}
	shm := c.Pod.Shm
	if shm == "" && !Own(c.Pod.Config).IPC {
		shm = "/dev/shm"
	}
	var mounts []specs.Mount
	for _, f := range []struct{ source, destination, access string }{
		{shm, "/dev/shm", "rw"},
		{c.Pod.ResolvConf, "/etc/resolv.conf", access},
		{c.Pod.Hosts, "/etc/hosts", access},
		{c.Pod.Hostname, "/etc/hostname", access},
	} {
		if f.source != "" {
			mounts = append(mounts, specs.Mount{Destination: f.destination, Type: "bind", Source: f.source,
				Options: append(slices.Clone(podFileOptions), f.access)})
		}
	}
	return mounts
}

// configMount is one mount of the config.
func configMount(field string, m *runtime.Mount, volumes map[string]specs.Mount, c Container) (specs.Mount, error) {
	destination := path.Clean(m.GetContainerPath())
	if m.GetImage() != nil {
		prepared, ok := volumes[destination]
		if !ok {
			return specs.Mount{}, unable(field+".image", "image %q is not mounted", m.GetImage().GetImage())
		}
		prepared.Options = append(slices.Clone(prepared.Options), m.GetMountOptions()...)
		return prepared, nil
	}
	source, err := mountSource(field, m, c)
	if err != nil {
		return specs.Mount{}, err
	}
	options := []string{"rbind", propagationOption(m.GetPropagation())}
	switch {
	case m.GetRecursiveReadOnly() && !c.Host.RRO:
		// kubelet looks for the string of ErrRROUnsupported in the message.
		return specs.Mount{}, fmt.Errorf("%w: %s.recursive_read_only: the kernel cannot (Linux 5.12 can): %w",
			crierrors.ErrRROUnsupported, field, errdefs.ErrFailedPrecondition)
	case m.GetRecursiveReadOnly():
		options = append(options, "rro")
	case m.GetReadonly():
		options = append(options, "ro")
	default:
		options = append(options, "rw")
	}
	if len(m.GetUidMappings()) > 0 && !c.Host.IDMapMounts {
		return specs.Mount{}, unable(field+".uidMappings", "id-mapped mounts are not supported on this machine")
	}
	return specs.Mount{
		Destination: destination,
		Type:        "bind",
		Source:      source,
		Options:     append(options, m.GetMountOptions()...),
		UIDMappings: idMappings(m.GetUidMappings()),
		GIDMappings: idMappings(m.GetGidMappings()),
	}, nil
}

// mountSource is the real path of a mount's source. A mount that is to
// propagate needs a source that does: the kernel would bind it without a word
// and never propagate anything.
func mountSource(field string, m *runtime.Mount, c Container) (string, error) {
	s, known := c.Sources[m.GetHostPath()]
	if !known {
		return path.Clean(m.GetHostPath()), nil
	}
	switch m.GetPropagation() {
	case runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if !s.Shared {
			return "", unable(field+".propagation", "%s is not on a shared mount", s.Path)
		}
	case runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if !s.Shared && !s.Slave {
			return "", unable(field+".propagation", "%s is on neither a shared nor a slave mount", s.Path)
		}
	}
	return s.Path, nil
}

func propagationOption(p runtime.MountPropagation) string {
	switch p {
	case runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return "rshared"
	case runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return "rslave"
	default:
		return "rprivate"
	}
}

// widest is the propagation the container's root must have for what its mounts
// ask: a private root would cut them off. Empty leaves the default, private.
func widest(have string, p runtime.MountPropagation) string {
	switch p {
	case runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return "rshared"
	case runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if have == "" {
			return "rslave"
		}
	}
	return have
}

// mountOptions are the flags a config may add to a bind mount. Those with an
// "r" work on the mounts below as well. Read-only and propagation have fields
// of their own; file system options mean nothing to a bind mount.
var mountOptions = map[string]bool{
	"noexec": true, "nodev": true, "nosuid": true, "nosymfollow": true,
	"noatime": true, "nodiratime": true, "relatime": true, "strictatime": true,
	"exec": true, "dev": true, "suid": true, "symfollow": true,
	"rnoexec": true, "rnodev": true, "rnosuid": true, "rnosymfollow": true,
	"rnoatime": true, "rnodiratime": true, "rrelatime": true, "rstrictatime": true,
}
