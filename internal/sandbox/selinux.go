package sandbox

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels are the SELinux labels of processes and of the files they may use, for the
// options of a security context; both are empty where SELinux is off. What the
// options leave open is the pod's (the parts of podLabel), and for the pod itself
// ("") the policy's default with a level that no other pod has.
//
// Errors name the option's field.
func Labels(o *runtime.SELinuxOption, podLabel string) (process, mount string, err error) {
	if !selinux.GetEnabled() {
		return "", "", nil
	}
	options, err := labelOptions(o, podLabel)
	if err == nil {
		process, mount, err = label.InitLabels(options)
	}
	for _, l := range []string{process, mount} {
		if err == nil && l != "" && selinux.SecurityCheckContext(l) != nil {
			err = fmt.Errorf("the SELinux policy of this machine has no %s: %w", l, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		return "", "", fmt.Errorf("linux.security_context.selinux_options: %w", err)
	}
	return process, mount, nil
}

// labelOptions writes options as package label reads them, "key:value": those of
// the pod's label first, the config's over them.
func labelOptions(o *runtime.SELinuxOption, podLabel string) ([]string, error) {
	options, err := selinux.DupSecOpt(podLabel)
	if err != nil {
		return nil, fmt.Errorf("label of the pod: %w", err)
	}
	for _, part := range []struct{ key, value string }{
		{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}, {"level", o.GetLevel()},
	} {
		if part.value != "" {
			options = append(options, part.key+":"+part.value)
		}
	}
	return options, nil
}

// Relabel gives path, and all below it, a mount label, so that the pod may use it
// and no other pod may. Without a label, and on a file system that has none,
// nothing has to be done.
func Relabel(path, mountLabel string) error {
	if mountLabel == "" {
		return nil
	}
	if err := label.Relabel(path, mountLabel, false); err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("give %s the SELinux label %s: %w", path, mountLabel, err)
	}
	return nil
}

// sharedLabel is the policy's label of what every pod may read and run, and none
// may write; "" where SELinux is off.
func sharedLabel() string {
	process, _ := selinux.ContainerLabels() // reads the labels, and takes a level that is not needed
	selinux.ReleaseLabel(process)
	return selinux.ROFileLabel()
}

// reserveLabels keeps every other pod from getting the labels of this one.
func reserveLabels(r *Record) {
	if r.ProcessLabel != "" {
		selinux.ReserveLabel(r.ProcessLabel)
	}
}

// releaseLabels lets another pod have the labels.
func releaseLabels(r *Record) {
	if r.ProcessLabel != "" {
		selinux.ReleaseLabel(r.ProcessLabel)
	}
}
