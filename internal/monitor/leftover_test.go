package monitor_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/podshim/podshim/internal/monitor"
)

func skipUnlessV1(t testing.TB) {
	if _, err := os.Stat("/sys/fs/cgroup/freezer"); err != nil {
		t.Skip("needs cgroup v1")
	}
}

// What could not be removed at the exit is not forgotten by Delete.
func TestDeleteUntilNothingIsLeft(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	id, _ := m.start("read x", func(r *monitor.StartRequest) { r.Stdin = true })
	// In one hierarchy only, where no list of the container's processes shows it.
	squatter := exec.Command("sleep", "1000")
	must(t, squatter.Start())
	defer squatter.Wait()
	defer squatter.Process.Kill()
	dir := "/sys/fs/cgroup/cpu" + m.cgroup + "/" + id
	must(t, os.WriteFile(dir+"/cgroup.procs", fmt.Append(nil, squatter.Process.Pid), 0))
	must(t, m.CloseStdin(t.Context(), id))
	m.exit(id)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := m.Delete(ctx, id); err == nil {
		t.Error("deleted, with a process in its cgroup")
	}
	must(t, squatter.Process.Kill())
	_ = squatter.Wait()
	must(t, m.Delete(t.Context(), id))
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
		t.Errorf("cgroup left: %v", dirs)
	}
}

// A container may freeze processes in cgroups that it has made itself.
func TestDeleteFrozenChild(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	id, p := m.start("sleep 1000 & echo ready; wait")
	m.awaitLog(id, "ready")
	procs := readFile(t, "/sys/fs/cgroup/devices"+m.cgroup+"/"+id+"/cgroup.procs")
	dir := "/sys/fs/cgroup/freezer" + m.cgroup + "/" + id + "/inner"
	must(t, os.Mkdir(dir, 0o755))
	for pid := range strings.FieldsSeq(procs) {
		if pid != fmt.Sprint(p.PID) {
			must(t, os.WriteFile(dir+"/cgroup.procs", []byte(pid), 0))
		}
	}
	must(t, os.WriteFile(dir+"/freezer.state", []byte("FROZEN"), 0))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := m.Delete(ctx, id)
	if err != nil {
		must(t, os.WriteFile(dir+"/freezer.state", []byte("THAWED"), 0)) // let the rest end
	}
	must(t, err)
}
