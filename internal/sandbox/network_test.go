package sandbox

import (
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pod that sets IPv6 up has it, on whatever network.
func TestPodThatAsksForIPv6(t *testing.T) {
	for sysctl, want := range map[string]bool{
		"net.ipv6.conf.all.disable_ipv6": true,
		"net/ipv6/conf/all/forwarding":   true,
		"net.ipv4.ip_forward":            false,
		"kernel.shm_rmid_forced":         false,
	} {
		pod, err := cniPod(&Record{ID: "a", Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: "a", Namespace: "b", Uid: "c"},
			Linux:    &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{sysctl: "1"}},
		}})
		if err != nil || pod.IPv6 != want {
			t.Errorf("%s: IPv6 %v (%v), want %v", sysctl, pod.IPv6, err, want)
		}
	}
}
