package sandbox

import (
	"slices"
	"testing"

	"github.com/opencontainers/selinux/go-selinux"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestLabelOptions(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    *runtime.SELinuxOption
		pod  string
		want []string
	}{
		{name: "pod without options"},
		{name: "pod", o: &runtime.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s0:c1,c2"},
			want: []string{"user:u", "role:r", "type:t", "level:s0:c1,c2"}},
		{name: "container has its pod's level", o: &runtime.SELinuxOption{Type: "spc_t"}, pod: "system_u:system_r:container_t:s0:c3,c4",
			want: []string{"user:system_u", "role:system_r", "type:container_t", "level:s0:c3,c4", "type:spc_t"}},
	} {
		got, err := labelOptions(tc.o, tc.pod)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, err, tc.want)
		}
	}
	if _, err := labelOptions(nil, "no label"); err == nil {
		t.Error("a pod label that is none was taken")
	}
}

func TestLabelsWithoutSELinux(t *testing.T) {
	if selinux.GetEnabled() {
		t.Skip("SKIPPED: SELinux is on")
	}
	process, mount, err := Labels(&runtime.SELinuxOption{Type: "spc_t"}, "")
	if process != "" || mount != "" || err != nil {
		t.Errorf("labels are %q and %q, %v", process, mount, err)
	}
	if err := Relabel("/no/such/path", ""); err != nil {
		t.Error(err)
	}
}
