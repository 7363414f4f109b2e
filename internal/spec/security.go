package spec

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The values of the deprecated string fields seccomp_profile_path and
// apparmor_profile.
const (
	profileRuntimeDefault = "runtime/default"
	profileDockerDefault  = "docker/default"
	profileUnconfined     = "unconfined"
	profileLocalhost      = "localhost/"
)

// stringProfile reads a deprecated string field; nil is unset.
func stringProfile(field, s string) (*runtime.SecurityProfile, error) {
	switch {
	case s == "":
		return nil, nil
	case s == profileRuntimeDefault, s == profileDockerDefault:
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, nil
	case s == profileUnconfined:
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(s, profileLocalhost):
		return &runtime.SecurityProfile{
			ProfileType:  runtime.SecurityProfile_Localhost,
			LocalhostRef: strings.TrimPrefix(s, profileLocalhost),
		}, nil
	}
	return nil, invalid(field, "%q is not runtime/default, unconfined or localhost/<profile>", s)
}

// validateProfile checks the shape of a profile message; absolute is whether
// the reference is a path.
func validateProfile(field string, p *runtime.SecurityProfile, absolute bool) error {
	if p == nil {
		return nil
	}
	if _, known := runtime.SecurityProfile_ProfileType_name[int32(p.GetProfileType())]; !known {
		return invalid(field+".profile_type", "%d is unknown", p.GetProfileType())
	}
	local, ref := p.GetProfileType() == runtime.SecurityProfile_Localhost, p.GetLocalhostRef()
	switch {
	case local && ref == "":
		return invalid(field+".localhost_ref", "a Localhost profile needs it")
	case !local && ref != "":
		return invalid(field+".localhost_ref", "is for Localhost profiles only")
	case local && (hasNUL(ref) || (absolute && !path.IsAbs(ref))):
		return invalid(field+".localhost_ref", "%q is not an absolute path", ref)
	}
	return nil
}

// seccompRequest is what seccompFor decides by.
type seccompRequest struct {
	field      string // path of the security context in the message
	profile    *runtime.SecurityProfile
	deprecated string
	privileged bool
	handler    Handler
	host       Host
	read       func(path string) ([]byte, error)
	spec       *specs.Spec // with its capabilities, which profiles depend on
}

// seccompFor is the filter of a container or sandbox; nil is unconfined. The
// built-in profile allows what the container's bounding set would allow.
func seccompFor(r seccompRequest) (*specs.LinuxSeccomp, error) {
	p := r.profile
	if p == nil {
		var err error
		if p, err = stringProfile(r.field+".seccomp_profile_path", r.deprecated); err != nil {
			return nil, err
		}
	}
	asked := p != nil
	if p == nil {
		p = r.handler.UnsetSeccomp
	}
	if p == nil || r.privileged || p.GetProfileType() == runtime.SecurityProfile_Unconfined {
		return nil, nil
	}
	if !r.host.Seccomp {
		if !asked {
			return nil, nil
		}
		return nil, unable(r.field+".seccomp", "the kernel has no seccomp")
	}
	if p.GetProfileType() == runtime.SecurityProfile_Localhost {
		return localSeccomp(r, p.GetLocalhostRef())
	}
	if body := r.handler.SeccompProfile; body != nil {
		profile, err := seccomp.LoadProfile(string(body), r.spec)
		if err != nil {
			return nil, fmt.Errorf("seccomp profile of handler %q: %w", r.handler.Name, err)
		}
		return profile, nil
	}
	profile, err := seccomp.GetDefaultProfile(r.spec)
	if err != nil {
		return nil, fmt.Errorf("evaluate built-in seccomp profile: %w", err)
	}
	return profile, nil
}

// localSeccomp loads a profile of the node, in Docker's format or the OCI's.
func localSeccomp(r seccompRequest, ref string) (*specs.LinuxSeccomp, error) {
	field := r.field + ".seccomp.localhost_ref"
	if r.read == nil {
		return nil, fmt.Errorf("%s: profiles of the node are not read: %w", field, errdefs.ErrNotImplemented)
	}
	body, err := r.read(ref)
	if err != nil {
		return nil, fmt.Errorf("%s: read profile: %w", field, err)
	}
	profile, err := seccomp.LoadProfile(string(body), r.spec)
	if err != nil {
		return nil, invalid(field, "%s: %v", ref, err)
	}
	return profile, nil
}

// DefaultAppArmor is the profile that RuntimeDefault means.
const DefaultAppArmor = "podshim-default"

// containerAppArmor is the name of the profile to change to on exec, which is
// loaded; empty is none. An unset profile means the default one, where AppArmor
// is on. Asking by name for AppArmor on a machine without it is an error, whoever
// is privileged.
func containerAppArmor(sc *runtime.LinuxContainerSecurityContext, loaded func(string) error, host Host) (string, error) {
	const field = "linux.security_context.apparmor"
	p := sc.GetApparmor()
	if p == nil {
		var err error
		//nolint:staticcheck // deprecated, but kubelet may still send it
		if p, err = stringProfile(field+"_profile", sc.GetApparmorProfile()); err != nil {
			return "", err
		}
	}
	switch {
	case p.GetProfileType() == runtime.SecurityProfile_Unconfined:
		return "", nil
	case !host.AppArmor && p == nil:
		return "", nil
	case !host.AppArmor:
		return "", unable(field, "AppArmor is not enabled on this machine; `podshim check` says why")
	case sc.GetPrivileged() && p.GetProfileType() == runtime.SecurityProfile_RuntimeDefault:
		return "", nil
	}
	profile := DefaultAppArmor
	if p.GetProfileType() == runtime.SecurityProfile_Localhost {
		profile = strings.TrimPrefix(p.GetLocalhostRef(), profileLocalhost)
	}
	if err := loaded(profile); err != nil {
		return "", fmt.Errorf("%s: %w", field, err)
	}
	return profile, nil
}
