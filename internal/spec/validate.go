package spec

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// Limits of names and values. The kernel's are exact; maxName is that of
// Kubernetes names (DNS subdomains), from which podshim builds file names.
const (
	maxName     = 253
	maxHostname = 64        // __NEW_UTS_LEN
	maxID       = 1<<32 - 2 // uid_t -1 means "unchanged" to the kernel
	maxIDMaps   = 340       // UID_GID_MAP_MAX_EXTENTS
)

// ValidatePod refuses a sandbox config that makes no sense on any machine, with
// errdefs.ErrInvalidArgument that names the field by its path in the message.
func ValidatePod(config *runtime.PodSandboxConfig) error {
	if config == nil {
		return invalid("config", "is missing")
	}
	meta := config.GetMetadata()
	if meta == nil {
		return invalid("metadata", "is missing")
	}
	if config.GetWindows() != nil {
		return invalid("windows", "podshim runs Linux pods")
	}
	sc := config.GetLinux().GetSecurityContext()
	return firstError(
		func() error { return validateName("metadata.name", meta.GetName()) },
		func() error { return validateName("metadata.namespace", meta.GetNamespace()) },
		func() error { return validateName("metadata.uid", meta.GetUid()) },
		func() error { return validateHostname(config.GetHostname()) },
		func() error { return validateOptionalPath("log_directory", config.GetLogDirectory()) },
		func() error { return validateDNS(config.GetDnsConfig()) },
		func() error { return validatePorts(config.GetPortMappings()) },
		func() error { return validateCgroupParent(config.GetLinux().GetCgroupParent()) },
		func() error { return validatePodNamespaces(config) },
		func() error { return validateSysctls(config) },
		func() error {
			return validateUser("linux.security_context", sc.GetRunAsUser(), sc.GetRunAsGroup(), "",
				sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
		},
		func() error {
			//nolint:staticcheck // deprecated, but kubelet may still send it
			return validateSeccomp("linux.security_context", sc.GetSeccomp(), sc.GetSeccompProfilePath())
		},
		func() error { return validateProfile("linux.security_context.apparmor", sc.GetApparmor(), false) },
		func() error { return validateSELinux("linux.security_context.selinux_options", sc.GetSelinuxOptions()) },
		func() error { return validateResources("linux.overhead", config.GetLinux().GetOverhead()) },
		func() error { return validateResources("linux.resources", config.GetLinux().GetResources()) },
	)
}

// ValidatePodResources refuses resources of a pod that make no sense on any
// machine (CRI UpdatePodSandboxResourcesRequest); nil is none.
func ValidatePodResources(overhead, resources *runtime.LinuxContainerResources) error {
	return firstError(
		func() error { return validateResources("overhead", overhead) },
		func() error { return validateResources("resources", resources) },
	)
}

// ValidateContainer refuses a container config that makes no sense on any
// machine or in a pod of that config; pod has passed ValidatePod.
func ValidateContainer(config *runtime.ContainerConfig, pod *runtime.PodSandboxConfig) error {
	switch {
	case config == nil:
		return invalid("config", "is missing")
	case pod == nil:
		return invalid("sandbox_config", "is missing")
	case config.GetMetadata() == nil:
		return invalid("metadata", "is missing")
	case config.GetImage().GetImage() == "":
		return invalid("image.image", "is missing")
	case config.GetWindows() != nil:
		return invalid("windows", "podshim runs Linux containers")
	}
	sc := config.GetLinux().GetSecurityContext()
	return firstError(
		func() error { return validateName("metadata.name", config.GetMetadata().GetName()) },
		func() error { return validateWords("command", config.GetCommand()) },
		func() error { return validateWords("args", config.GetArgs()) },
		func() error { return validateOptionalPath("working_dir", config.GetWorkingDir()) },
		func() error { return validateEnvs(config.GetEnvs()) },
		func() error { return validateMounts(config.GetMounts()) },
		func() error { return validateDevices(config.GetDevices()) },
		func() error { return validateCDI(config.GetCDIDevices()) },
		func() error { return validateLogPath(config.GetLogPath()) },
		func() error { return validateStopSignal(config.GetStopSignal()) },
		func() error { return validateResources("linux.resources", config.GetLinux().GetResources()) },
		func() error { return validateSecurityContext(sc, pod) },
	)
}

// firstError runs checks until one fails.
func firstError(checks ...func() error) error {
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// validateName refuses what cannot be part of a file name or a log line.
func validateName(field, s string) error {
	switch {
	case s == "":
		return invalid(field, "is missing")
	case len(s) > maxName:
		return invalid(field, "is %d bytes long, %d are allowed", len(s), maxName)
	case s == "." || s == "..", strings.ContainsFunc(s, func(r rune) bool { return r == '/' || unicode.IsControl(r) }):
		return invalid(field, "%q holds a slash or a control character", s)
	}
	return nil
}

func validateHostname(s string) error {
	if len(s) > maxHostname {
		return invalid("hostname", "is %d bytes long, the kernel allows %d", len(s), maxHostname)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r == '/' || unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return invalid("hostname", "%q holds a slash, a space or a control character", s)
	}
	return nil
}

// validatePath wants a path from the root.
func validatePath(field, s string) error {
	if !path.IsAbs(s) || hasNUL(s) {
		return invalid(field, "%q is not an absolute path", s)
	}
	return nil
}

func validateOptionalPath(field, s string) error {
	if s == "" {
		return nil
	}
	return validatePath(field, s)
}

// validateDNS refuses what would not stay one word of one line of resolv.conf.
func validateDNS(dns *runtime.DNSConfig) error {
	for i, s := range dns.GetServers() {
		if _, err := netip.ParseAddr(s); err != nil {
			return invalid(fmt.Sprintf("dns_config.servers[%d]", i), "%q is not an IP address", s)
		}
	}
	for name, words := range map[string][]string{"searches": dns.GetSearches(), "options": dns.GetOptions()} {
		for i, s := range words {
			if s == "" || strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
				return invalid(fmt.Sprintf("dns_config.%s[%d]", name, i), "%q is not one word", s)
			}
		}
	}
	return nil
}

func validatePorts(ports []*runtime.PortMapping) error {
	taken := make(map[string]int)
	for i, p := range ports {
		field := fmt.Sprintf("port_mappings[%d]", i)
		if _, known := runtime.Protocol_name[int32(p.GetProtocol())]; !known {
			return invalid(field+".protocol", "%d is unknown", p.GetProtocol())
		}
		if p.GetContainerPort() < 1 || p.GetContainerPort() > 65535 {
			return invalid(field+".container_port", "%d is not a port", p.GetContainerPort())
		}
		if p.GetHostPort() < 0 || p.GetHostPort() > 65535 {
			return invalid(field+".host_port", "%d is not a port", p.GetHostPort())
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return invalid(field+".host_ip", "%q is not an IP address", ip)
			}
		}
		if p.GetHostPort() == 0 {
			continue
		}
		key := fmt.Sprintf("%s %s %d", p.GetProtocol(), p.GetHostIp(), p.GetHostPort())
		if first, dup := taken[key]; dup {
			return invalid(field+".host_port", "%d/%s is mapped by port_mappings[%d] already", p.GetHostPort(), p.GetProtocol(), first)
		}
		taken[key] = i
	}
	return nil
}

// validateCgroupParent refuses a parent that names a cgroup above the root or
// that systemd's "slice:prefix:name" could not hold.
func validateCgroupParent(s string) error {
	const field = "linux.cgroup_parent"
	if slices.Contains(strings.Split(s, "/"), "..") {
		return invalid(field, "%q holds \"..\"", s)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r == ':' || unicode.IsControl(r) }) {
		return invalid(field, "%q holds a colon or a control character", s)
	}
	return nil
}

func validatePodNamespaces(config *runtime.PodSandboxConfig) error {
	const field = "linux.security_context.namespace_options"
	o := podNamespaces(config)
	for _, ns := range []struct {
		name    string
		mode    runtime.NamespaceMode
		allowed []runtime.NamespaceMode
	}{
		{".network", o.GetNetwork(), []runtime.NamespaceMode{runtime.NamespaceMode_POD, runtime.NamespaceMode_NODE}},
		{".ipc", o.GetIpc(), []runtime.NamespaceMode{runtime.NamespaceMode_POD, runtime.NamespaceMode_NODE}},
		{".pid", o.GetPid(), []runtime.NamespaceMode{runtime.NamespaceMode_POD, runtime.NamespaceMode_CONTAINER, runtime.NamespaceMode_NODE}},
	} {
		if !slices.Contains(ns.allowed, ns.mode) {
			return invalid(field+ns.name, "a sandbox cannot have mode %s", ns.mode)
		}
	}
	if o.GetTargetId() != "" {
		return invalid(field+".target_id", "a sandbox has no target")
	}
	if err := validateUserns(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	if hasUserns(config) {
		// Only a user namespace that owns the other namespace may mount its
		// proc or mqueue; Kubernetes forbids the combination too.
		if o.GetPid() == runtime.NamespaceMode_NODE {
			return invalid(field+".pid", "NODE does not go with a user namespace")
		}
		if o.GetIpc() == runtime.NamespaceMode_NODE {
			return invalid(field+".ipc", "NODE does not go with a user namespace")
		}
	}
	return nil
}

func validateUserns(field string, o *runtime.UserNamespace) error {
	if o == nil {
		return nil
	}
	switch o.GetMode() {
	case runtime.NamespaceMode_NODE:
		if len(o.GetUids())+len(o.GetGids()) > 0 {
			return invalid(field+".mode", "NODE has no mappings")
		}
		return nil
	case runtime.NamespaceMode_POD:
	default:
		return invalid(field+".mode", "%s is not POD or NODE", o.GetMode())
	}
	return firstError(
		func() error { return validateIDMaps(field+".uids", o.GetUids(), true) },
		func() error { return validateIDMaps(field+".gids", o.GetGids(), true) },
	)
}

// validateIDMaps checks mappings as the kernel would: 1 to 340 ranges, none
// empty, none wrapping, none overlapping on either side.
func validateIDMaps(field string, maps []*runtime.IDMapping, root bool) error {
	if len(maps) == 0 {
		return invalid(field, "is empty")
	}
	if len(maps) > maxIDMaps {
		return invalid(field, "has %d ranges, the kernel takes %d", len(maps), maxIDMaps)
	}
	rootMapped := false
	for i, m := range maps {
		at := fmt.Sprintf("%s[%d]", field, i)
		c, h, n := uint64(m.GetContainerId()), uint64(m.GetHostId()), uint64(m.GetLength())
		if n == 0 {
			return invalid(at+".length", "is zero")
		}
		if c+n > maxID+1 || h+n > maxID+1 {
			return invalid(at+".length", "%d goes beyond the last ID", n)
		}
		rootMapped = rootMapped || c == 0
		for j, o := range maps[:i] {
			oc, oh, on := uint64(o.GetContainerId()), uint64(o.GetHostId()), uint64(o.GetLength())
			if (c < oc+on && oc < c+n) || (h < oh+on && oh < h+n) {
				return invalid(at, "overlaps range %d", j)
			}
		}
	}
	if root && !rootMapped {
		return invalid(field, "container ID 0 is not mapped")
	}
	return nil
}

// ipcSysctls are the sysctls of the IPC namespace besides fs.mqueue.
var ipcSysctls = map[string]bool{
	"kernel.msgmax": true, "kernel.msgmnb": true, "kernel.msgmni": true, "kernel.sem": true,
	"kernel.shmall": true, "kernel.shmmax": true, "kernel.shmmni": true, "kernel.shm_rmid_forced": true,
}

// validateSysctls refuses sysctls that would change the host: those of no
// namespace, and those of a namespace the pod shares with it.
func validateSysctls(config *runtime.PodSandboxConfig) error {
	own := Own(config)
	for name, value := range config.GetLinux().GetSysctls() {
		field := fmt.Sprintf("linux.sysctls[%q]", name)
		key := dotted(name)
		if hasNUL(value) || strings.Contains(name, "..") || strings.ContainsFunc(name, unicode.IsControl) {
			return invalid(field, "is no sysctl")
		}
		var namespace string
		var has bool
		switch {
		case strings.HasPrefix(key, "net."):
			namespace, has = "network", own.Net
		case ipcSysctls[key], strings.HasPrefix(key, "fs.mqueue."):
			namespace, has = "IPC", own.IPC
		case key == "kernel.domainname":
			namespace, has = "UTS", own.UTS
		case key == "kernel.hostname":
			return invalid(field, "the pod's hostname is in the field hostname")
		case strings.HasPrefix(key, "user."):
			namespace, has = "user", own.User
		default:
			return invalid(field, "belongs to no namespace: it would change the host")
		}
		if !has {
			return invalid(field, "the pod has the host's %s namespace", namespace)
		}
	}
	return nil
}

// dotted gives a sysctl written with slashes its usual dots, by the rule of
// sysctl(8): the first separator decides, and the other one is swapped.
func dotted(name string) string {
	if i := strings.IndexAny(name, "./"); i < 0 || name[i] == '.' {
		return name
	}
	return strings.NewReplacer("/", ".", ".", "/").Replace(name)
}

func validateUser(field string, user, group *runtime.Int64Value, name string, groups []int64, policy runtime.SupplementalGroupsPolicy) error {
	id := func(at string, v int64) error {
		if v < 0 || v > maxID {
			return invalid(field+at, "%d is not an ID", v)
		}
		return nil
	}
	switch {
	case user != nil && name != "":
		return invalid(field+".run_as_username", "does not go with run_as_user")
	case group != nil && user == nil && name == "":
		return invalid(field+".run_as_group", "needs run_as_user or run_as_username")
	case strings.ContainsFunc(name, func(r rune) bool { return r == ':' || unicode.IsControl(r) }):
		return invalid(field+".run_as_username", "%q is not a user name", name)
	}
	if err := id(".run_as_user", user.GetValue()); err != nil {
		return err
	}
	if err := id(".run_as_group", group.GetValue()); err != nil {
		return err
	}
	for i, g := range groups {
		if err := id(fmt.Sprintf(".supplemental_groups[%d]", i), g); err != nil {
			return err
		}
	}
	if _, known := runtime.SupplementalGroupsPolicy_name[int32(policy)]; !known {
		return invalid(field+".supplemental_groups_policy", "%d is unknown", policy)
	}
	return nil
}

func validateSeccomp(field string, p *runtime.SecurityProfile, deprecated string) error {
	if err := validateProfile(field+".seccomp", p, true); err != nil || p != nil {
		return err
	}
	p, err := stringProfile(field+".seccomp_profile_path", deprecated)
	if err != nil {
		return err
	}
	return validateProfile(field+".seccomp_profile_path", p, true)
}

func validateSELinux(field string, o *runtime.SELinuxOption) error {
	if o == nil {
		return nil
	}
	for name, s := range map[string]string{"user": o.GetUser(), "role": o.GetRole(), "type": o.GetType()} {
		if strings.ContainsFunc(s, func(r rune) bool { return r == ':' || unicode.IsSpace(r) || unicode.IsControl(r) }) {
			return invalid(field+"."+name, "%q is no part of a label", s)
		}
	}
	if strings.ContainsFunc(o.GetLevel(), func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return invalid(field+".level", "%q is no part of a label", o.GetLevel())
	}
	return nil
}

func validateWords(field string, words []string) error {
	for i, w := range words {
		if hasNUL(w) {
			return invalid(fmt.Sprintf("%s[%d]", field, i), "holds a NUL byte")
		}
	}
	return nil
}

// validateEnvs never prints a value: it may be a secret.
func validateEnvs(envs []*runtime.KeyValue) error {
	for i, e := range envs {
		field := fmt.Sprintf("envs[%d]", i)
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") {
			return invalid(field+".key", "%q is not a variable's name", e.GetKey())
		}
		if hasNUL(string(e.GetValue())) {
			return invalid(field+".value", "of %s holds a NUL byte", e.GetKey())
		}
		// JSON carries the environment to the container's init, inside
		// libcontainer as well, and would change other bytes silently.
		if !utf8.Valid(e.GetValue()) {
			return invalid(field+".value", "of %s is not UTF-8, which libcontainer cannot pass on", e.GetKey())
		}
	}
	return nil
}

func validateMounts(mounts []*runtime.Mount) error {
	taken := make(map[string]int)
	for i, m := range mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		if err := validateMount(field, m); err != nil {
			return err
		}
		destination := path.Clean(m.GetContainerPath())
		if first, dup := taken[destination]; dup {
			return invalid(field+".container_path", "%s is the destination of mounts[%d] already", destination, first)
		}
		taken[destination] = i
	}
	return nil
}

func validateMount(field string, m *runtime.Mount) error {
	if err := validatePath(field+".container_path", m.GetContainerPath()); err != nil {
		return err
	}
	if path.Clean(m.GetContainerPath()) == "/" {
		return invalid(field+".container_path", "the container's root comes from its image")
	}
	if _, known := runtime.MountPropagation_name[int32(m.GetPropagation())]; !known {
		return invalid(field+".propagation", "%d is unknown", m.GetPropagation())
	}
	if m.GetImage() != nil {
		if err := validateImageMount(field, m); err != nil {
			return err
		}
	} else if err := validatePath(field+".host_path", m.GetHostPath()); err != nil {
		return err
	}
	// image_sub_path without image means nothing: kubelet puts every mount's subPath
	// there when another mount of the container is an image.
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid(field+".recursive_read_only", "needs readonly")
		}
		if m.GetPropagation() != runtime.MountPropagation_PROPAGATION_PRIVATE {
			return invalid(field+".recursive_read_only", "needs private propagation")
		}
	}
	for i, o := range m.GetMountOptions() {
		if !mountOptions[o] {
			return invalid(fmt.Sprintf("%s.mount_options[%d]", field, i), "%q is not an option of bind mounts", o)
		}
	}
	if len(m.GetUidMappings())+len(m.GetGidMappings()) > 0 {
		return firstError(
			func() error { return validateIDMaps(field+".uidMappings", m.GetUidMappings(), false) },
			func() error { return validateIDMaps(field+".gidMappings", m.GetGidMappings(), false) },
		)
	}
	return nil
}

func validateImageMount(field string, m *runtime.Mount) error {
	switch {
	case m.GetImage().GetImage() == "":
		return invalid(field+".image.image", "is missing")
	case m.GetHostPath() != "":
		return invalid(field+".host_path", "does not go with image")
	case m.GetPropagation() != runtime.MountPropagation_PROPAGATION_PRIVATE:
		return invalid(field+".propagation", "image mounts are private")
	case m.GetImageSubPath() != "" && (!isLocal(m.GetImageSubPath()) || hasNUL(m.GetImageSubPath())):
		return invalid(field+".image_sub_path", "%q leaves the image", m.GetImageSubPath())
	}
	return nil
}

// isLocal tells whether a relative path stays below where it starts.
func isLocal(s string) bool {
	clean := path.Clean(s)
	return !path.IsAbs(s) && clean != ".." && !strings.HasPrefix(clean, "../")
}

func validateDevices(devices []*runtime.Device) error {
	for i, d := range devices {
		field := fmt.Sprintf("devices[%d]", i)
		if err := validatePath(field+".host_path", d.GetHostPath()); err != nil {
			return err
		}
		if err := validateOptionalPath(field+".container_path", d.GetContainerPath()); err != nil {
			return err
		}
		if strings.Trim(d.GetPermissions(), fullAccess) != "" {
			return invalid(field+".permissions", "%q is not of r, w and m", d.GetPermissions())
		}
	}
	return nil
}

func validateCDI(devices []*runtime.CDIDevice) error {
	for i, d := range devices {
		if !parser.IsQualifiedName(d.GetName()) {
			return invalid(fmt.Sprintf("CDI_devices[%d].name", i), "%q is not vendor/class=device", d.GetName())
		}
	}
	return nil
}

func validateLogPath(s string) error {
	if s != "" && (!isLocal(s) || path.Clean(s) == "." || hasNUL(s)) {
		return invalid("log_path", "%q is not a path below the pod's log directory", s)
	}
	return nil
}

func validateStopSignal(s runtime.Signal) error {
	if _, known := runtime.Signal_name[int32(s)]; !known {
		return invalid("stop_signal", "%d is unknown", s)
	}
	return nil
}

func validateSecurityContext(sc *runtime.LinuxContainerSecurityContext, pod *runtime.PodSandboxConfig) error {
	const field = "linux.security_context"
	if sc.GetPrivileged() && !pod.GetLinux().GetSecurityContext().GetPrivileged() {
		return invalid(field+".privileged", "the sandbox is not privileged")
	}
	return firstError(
		func() error { return validateContainerNamespaces(field+".namespace_options", sc, pod) },
		func() error {
			return validateUser(field, sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername(),
				sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
		},
		func() error { return validateCapabilities(field+".capabilities", sc.GetCapabilities()) },
		func() error { return validatePaths(field+".masked_paths", sc.GetMaskedPaths()) },
		func() error { return validatePaths(field+".readonly_paths", sc.GetReadonlyPaths()) },
		func() error {
			//nolint:staticcheck // deprecated, but kubelet may still send it
			return validateSeccomp(field, sc.GetSeccomp(), sc.GetSeccompProfilePath())
		},
		func() error { return validateProfile(field+".apparmor", sc.GetApparmor(), false) },
		func() error {
			//nolint:staticcheck // deprecated, but kubelet may still send it
			_, err := stringProfile(field+".apparmor_profile", sc.GetApparmorProfile())
			return err
		},
		func() error { return validateSELinux(field+".selinux_options", sc.GetSelinuxOptions()) },
	)
}

// validateContainerNamespaces holds a container to its pod: network, IPC and
// user namespace are the pod's. A mode of POD, which is also what a client
// sends that sets none, follows the pod whatever it has.
func validateContainerNamespaces(field string, sc *runtime.LinuxContainerSecurityContext, pod *runtime.PodSandboxConfig) error {
	o, p := sc.GetNamespaceOptions(), podNamespaces(pod)
	for _, ns := range []struct {
		name      string
		own, pods runtime.NamespaceMode
	}{
		{".network", o.GetNetwork(), p.GetNetwork()},
		{".ipc", o.GetIpc(), p.GetIpc()},
	} {
		if ns.own != runtime.NamespaceMode_POD && ns.own != runtime.NamespaceMode_NODE {
			return invalid(field+ns.name, "a container cannot have mode %s", ns.own)
		}
		if ns.own == runtime.NamespaceMode_NODE && ns.pods != runtime.NamespaceMode_NODE {
			return invalid(field+ns.name, "NODE, but the sandbox has %s", ns.pods)
		}
	}
	if _, known := runtime.NamespaceMode_name[int32(o.GetPid())]; !known {
		return invalid(field+".pid", "%d is unknown", o.GetPid())
	}
	switch {
	case o == nil:
	case o.GetPid() == runtime.NamespaceMode_NODE && p.GetPid() != runtime.NamespaceMode_NODE:
		return invalid(field+".pid", "NODE, but the sandbox has %s", p.GetPid())
	case o.GetPid() == runtime.NamespaceMode_POD && p.GetPid() == runtime.NamespaceMode_CONTAINER:
		return invalid(field+".pid", "POD, but the sandbox has CONTAINER: there is no PID namespace to join")
	case o.GetPid() == runtime.NamespaceMode_TARGET && o.GetTargetId() == "":
		return invalid(field+".target_id", "PID mode TARGET needs it")
	case o.GetPid() != runtime.NamespaceMode_TARGET && o.GetTargetId() != "":
		return invalid(field+".target_id", "is for PID mode TARGET only")
	}
	if err := validateUserns(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	if o.GetUsernsOptions() != nil && !sameUserns(o.GetUsernsOptions(), p.GetUsernsOptions()) {
		return invalid(field+".userns_options", "differ from the sandbox's")
	}
	return nil
}

// sameUserns compares by meaning: no options are the host's namespace.
func sameUserns(a, b *runtime.UserNamespace) bool {
	host := func(o *runtime.UserNamespace) bool { return o == nil || o.GetMode() == runtime.NamespaceMode_NODE }
	if host(a) || host(b) {
		return host(a) && host(b)
	}
	return slices.Equal(idMappings(a.GetUids()), idMappings(b.GetUids())) &&
		slices.Equal(idMappings(a.GetGids()), idMappings(b.GetGids()))
}

func validateCapabilities(field string, c *runtime.Capability) error {
	for _, list := range []struct {
		name string
		caps []string
	}{
		{".add_capabilities", c.GetAddCapabilities()},
		{".drop_capabilities", c.GetDropCapabilities()},
		{".add_ambient_capabilities", c.GetAddAmbientCapabilities()},
	} {
		if _, _, err := capabilityNames(field+list.name, list.caps); err != nil {
			return err
		}
	}
	return nil
}

func validatePaths(field string, paths []string) error {
	for i, p := range paths {
		if err := validatePath(fmt.Sprintf("%s[%d]", field, i), p); err != nil {
			return err
		}
	}
	return nil
}

// validateResources checks the numbers by the ranges of the kernel that do not
// depend on the machine.
func validateResources(field string, r *runtime.LinuxContainerResources) error {
	for _, n := range []struct {
		name          string
		value, lowest int64
		highest       int64
	}{
		{".cpu_period", r.GetCpuPeriod(), 1_000, 1_000_000},
		{".cpu_quota", r.GetCpuQuota(), Unlimited, 1 << 53},
		{".cpu_shares", r.GetCpuShares(), 2, 262_144},
		{".memory_limit_in_bytes", r.GetMemoryLimitInBytes(), Unlimited, 1<<63 - 1},
		{".memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), Unlimited, 1<<63 - 1},
		{".oom_score_adj", r.GetOomScoreAdj(), -1000, 1000},
	} {
		if n.value != 0 && (n.value < n.lowest || n.value > n.highest) {
			return invalid(field+n.name, "%d is not from %d to %d", n.value, n.lowest, n.highest)
		}
	}
	if q := r.GetCpuQuota(); q > 0 && q < 1_000 {
		return invalid(field+".cpu_quota", "%d us is below the kernel's 1000", q)
	}
	for name, s := range map[string]string{".cpuset_cpus": r.GetCpusetCpus(), ".cpuset_mems": r.GetCpusetMems()} {
		if !isNumberList(s) {
			return invalid(field+name, "%q is not a list of numbers and ranges such as 0-2,5", s)
		}
	}
	sizes := make(map[string]bool)
	for i, h := range r.GetHugepageLimits() {
		at := fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i)
		if h.GetPageSize() == "" {
			return invalid(at, "is missing")
		}
		if sizes[h.GetPageSize()] {
			return invalid(at, "%s is limited twice", h.GetPageSize())
		}
		sizes[h.GetPageSize()] = true
	}
	return validateUnified(field, r)
}

// isNumberList tells whether s is a list as cpuset files hold it; empty is none.
func isNumberList(s string) bool {
	if s == "" {
		return true
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, ranged := strings.Cut(part, "-")
		if !ranged {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if errA != nil || errB != nil || a > b {
			return false
		}
	}
	return true
}

// validateUnified holds keys to names of cgroup files: "memory.high", never a path.
func validateUnified(field string, r *runtime.LinuxContainerResources) error {
	for key, value := range r.GetUnified() {
		at := fmt.Sprintf("%s.unified[%q]", field, key)
		controller, file, ok := strings.Cut(key, ".")
		if !ok || controller == "" || file == "" || strings.ContainsAny(key, "/\x00") || strings.Contains(key, "..") {
			return invalid(at, "is not a cgroup file's name")
		}
		if controller == "cgroup" {
			return invalid(at, "the cgroup's own files are the runtime's")
		}
		if hasNUL(value) {
			return invalid(at, "its value holds a NUL byte")
		}
	}
	return nil
}
