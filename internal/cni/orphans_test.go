package cni

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// A process of another mount namespace, as every container's is, is no plugin
// whatever its environment says: nobody waits for it, and it is not killed.
func TestOrphansAreOfTheNode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mount namespaces")
	}
	for _, tc := range []struct {
		what  string
		clone uintptr
		found int
	}{
		{"a plugin", 0, 1},
		{"a container's process", syscall.CLONE_NEWNS, 0},
	} {
		t.Run(tc.what, func(t *testing.T) {
			pod := fmt.Sprintf("%064x", syscall.Getpid())
			cmd := exec.Command("sleep", "600")
			cmd.Env = []string{"A=b", "CNI_CONTAINERID=" + pod}
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: tc.clone}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
			found, err := findOrphans([]string{pod})
			if err != nil {
				t.Fatal(err)
			}
			defer found.close()
			if len(found[pod]) != tc.found {
				t.Errorf("%d plugins found, not %d", len(found[pod]), tc.found)
			}
		})
	}
}
