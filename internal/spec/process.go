package spec

import (
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DefaultPath is PATH for images and configs that set none, as Docker has it.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// The nofile limits of a handler that sets none in its configuration: those of
// systemd since version 240. A soft limit above 1024 breaks select(2), and a
// limit of a billion, which container runtimes used to inherit, makes every
// program that closes all descriptors up to the limit hang for minutes; a
// program that wants more raises its own soft limit up to the hard one.
const (
	DefaultNofileSoft = 1024
	DefaultNofileHard = 524288
)

// processArgs joins entrypoint and arguments by Docker's rules: a command in
// the config replaces the entrypoint and drops the image's cmd, args replace
// cmd only. An entrypoint of one empty string means none.
func processArgs(config *runtime.ContainerConfig, image ocispec.ImageConfig) ([]string, error) {
	command, args := config.GetCommand(), config.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = image.Cmd
		}
		if len(image.Entrypoint) != 1 || image.Entrypoint[0] != "" {
			command = image.Entrypoint
		}
	}
	all := slices.Concat(command, args)
	if len(all) == 0 {
		return nil, invalid("command", "neither config nor image names a program to run")
	}
	if all[0] == "" {
		return nil, invalid("command", "the program's name is empty")
	}
	if i := slices.IndexFunc(all, hasNUL); i >= 0 {
		return nil, invalid("command", "word %d holds a NUL byte", i)
	}
	return all, nil
}

// processEnv merges, the later over the earlier: defaults (PATH, HOSTNAME,
// TERM with a terminal), the image's, the config's. HOME comes last, only where
// nobody has set it. A variable keeps the place where it was first set.
func processEnv(c Container) ([]string, error) {
	env := []string{"PATH=" + DefaultPath}
	if name := firstOf(c.Pod.Config.GetHostname(), c.Host.Hostname); name != "" {
		env = append(env, "HOSTNAME="+name)
	}
	if c.Config.GetTty() {
		env = append(env, "TERM=xterm")
	}
	for _, kv := range c.Image.Env {
		// An image is untrusted: what is no assignment is no variable.
		if name, _, ok := strings.Cut(kv, "="); ok && name != "" && !hasNUL(kv) {
			env = setEnv(env, kv)
		}
	}
	for _, kv := range c.Config.GetEnvs() {
		env = setEnv(env, kv.GetKey()+"="+string(kv.GetValue()))
	}
	if !hasEnv(env, "HOME") {
		env = append(env, "HOME="+firstOf(c.Home, "/"))
	}
	return env, nil
}

// setEnv replaces the variable of the assignment kv, or appends it.
func setEnv(env []string, kv string) []string {
	name, _, _ := strings.Cut(kv, "=")
	for i, old := range env {
		if strings.HasPrefix(old, name+"=") {
			env[i] = kv
			return env
		}
	}
	return append(env, kv)
}

// hasEnv tells whether env assigns the variable.
func hasEnv(env []string, name string) bool {
	return slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, name+"=") })
}

// processCwd is the config's working directory, else the image's, else "/". An
// image's relative directory is meant from the root, as Docker reads it.
func processCwd(config *runtime.ContainerConfig, image ocispec.ImageConfig) string {
	if dir := config.GetWorkingDir(); dir != "" {
		return path.Clean(dir)
	}
	return path.Join("/", image.WorkingDir)
}

// processUser adds the config's groups to the resolved user: under Merge to
// those the image gives the user, under Strict in their place. The primary group
// is one of them, as a login has it. Groups are sorted and without repetition.
func processUser(c Container) specs.User {
	sc := c.Config.GetLinux().GetSecurityContext()
	user := c.User
	groups := []uint32{user.GID}
	if sc.GetSupplementalGroupsPolicy() == runtime.SupplementalGroupsPolicy_Merge {
		groups = append(groups, c.User.AdditionalGids...)
	}
	for _, g := range sc.GetSupplementalGroups() {
		groups = append(groups, uint32(g))
	}
	slices.Sort(groups)
	user.AdditionalGids = slices.Compact(groups)
	return user
}

// nofile is the container's RLIMIT_NOFILE: the handler's, but never more than
// the kernel lets this process give (raising a hard limit needs
// CAP_SYS_RESOURCE).
func nofile(h Handler, host Host) []specs.POSIXRlimit {
	if h.NofileSoft == 0 && h.NofileHard == 0 {
		return nil
	}
	hard := max(h.NofileSoft, h.NofileHard)
	if host.NofileHard != 0 {
		hard = min(hard, host.NofileHard)
	}
	soft := h.NofileSoft
	if soft == 0 {
		soft = hard
	}
	return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: hard, Soft: min(soft, hard)}}
}

// hasNUL tells whether the kernel would see the string cut short.
func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }
