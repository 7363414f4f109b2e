package monitor_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// podmon runs itself again for each container start and each exec, so what it
// links costs every one of them; and libcontainer's init code has no business in
// the daemon.
func TestDependencies(t *testing.T) {
	for _, tc := range []struct {
		program, tags string
		forbidden     []string
	}{
		{"../../cmd/podmon", "seccomp,netgo,osusergo", []string{
			"google.golang.org/grpc", "k8s.io/", "github.com/containerd/containerd", "github.com/containerd/errdefs",
			"net/http", "github.com/spf13/cobra", "go.etcd.io/bbolt",
		}},
		{"../../cmd/podshim", "", []string{"github.com/opencontainers/runc/libcontainer", "github.com/podshim/podshim/cmd/podmon"}},
		{"./wire", "", []string{"github.com/containerd", "github.com/sirupsen/logrus", "github.com/opencontainers/runc"}},
	} {
		t.Run(tc.program, func(t *testing.T) {
			if _, err := os.Stat(tc.program); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("go", "list", "-deps", "-tags", tc.tags, tc.program).CombinedOutput()
			if err != nil {
				t.Fatalf("go list: %v\n%s", err, out)
			}
			for dep := range strings.FieldsSeq(string(out)) {
				for _, f := range tc.forbidden {
					if strings.HasPrefix(dep, f) {
						t.Errorf("links %s", dep)
					}
				}
			}
		})
	}
}
