package check

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/capability"

	"github.com/podshim/podshim/internal/config"
)

// needed are the capabilities without which podshim cannot make a container.
var needed = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN",
	"CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
}

func privileges(_ context.Context, cfg *config.Config) []Finding {
	user := ok("user", "root")
	if uid := os.Geteuid(); uid != 0 {
		user = failure("user", fmt.Sprintf("uid %d", uid), "podshim mounts, and makes namespaces and cgroups", "run it as root")
	}
	have, err := effective()
	if err != nil {
		return []Finding{user, failure("capabilities", err.Error(), "what podshim may do is not known", "mount /proc")}
	}
	return append([]Finding{user}, judgeCapabilities(have, cfg.Runtime.DefaultCapabilities)...)
}

// effective lists this process's effective capabilities as "CAP_..." names.
func effective() ([]string, error) {
	caps, err := capability.NewPid2(0)
	if err != nil {
		return nil, err
	}
	if err := caps.Load(); err != nil {
		return nil, err
	}
	var names []string
	for _, c := range capability.ListKnown() {
		if caps.Get(capability.EFFECTIVE, c) {
			names = append(names, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	return names, nil
}

// judgeCapabilities says what follows from having only some capabilities, when
// containers are to get those of defaults.
func judgeCapabilities(have, defaults []string) []Finding {
	lacking := func(names []string) []string {
		return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return slices.Contains(have, n) })
	}
	findings := []Finding{ok("capabilities", "%d", len(have))}
	if missing := lacking(needed); len(missing) > 0 {
		findings[0] = failure("capabilities", "missing: "+strings.Join(missing, ", "),
			"containers cannot be made", "run podshim as root of the host; in a container: privileged")
	}
	if len(lacking([]string{"CAP_SYS_RESOURCE"})) > 0 {
		findings = append(findings, warning("CAP_SYS_RESOURCE", "missing",
			"oom_score_adj cannot be lowered nor hard limits raised: the values of containers are clamped to what is allowed, and podshim itself is not protected from the OOM killer",
			"give podshim the capability, if the machine can"))
	}
	if missing := lacking(defaults); len(missing) > 0 {
		findings = append(findings, warning("default capabilities", "missing: "+strings.Join(missing, ", "),
			"containers do not get these of runtime.default_capabilities", "give podshim the capabilities, or take them from the key"))
	}
	return findings
}
