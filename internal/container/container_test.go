package container

import (
	"io"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/state"
)

// memory keeps records as state.Store does, without its files.
type memory map[string][]byte

func (m memory) Put(_ state.Kind, id string, value []byte) error { m[id] = value; return nil }
func (m memory) Delete(_ state.Kind, id string) error            { delete(m, id); return nil }
func (m memory) Take(state.Kind) map[string][]byte               { return m }

func testManager(t *testing.T) (*Manager, memory) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	records := memory{}
	return newManager(Config{Records: records, RunDir: t.TempDir(), RootDir: t.TempDir(), Log: logrus.NewEntry(log)}), records
}

func TestIllegalMoves(t *testing.T) {
	m, _ := testManager(t)
	legal := map[[2]State]bool{
		{Creating, Created}: true, {Creating, Exited}: true,
		{Created, Running}: true, {Created, Exited}: true,
		{Running, Exited}: true,
	}
	states := []State{Creating, Created, Running, Exited}
	for _, from := range states {
		for _, to := range states {
			c := m.all.Add(&Record{ID: string(from + to), State: from, Config: &runtime.ContainerConfig{}})
			err := m.all.Move(c, to, nil)
			ok := legal[[2]State{from, to}]
			if ok != (err == nil) {
				t.Errorf("%s to %s: %v", from, to, err)
			}
			if want := map[bool]State{true: to, false: from}[ok]; c.Get().State != want {
				t.Errorf("%s to %s: is %s", from, to, c.Get().State)
			}
		}
	}
}

func TestVerdict(t *testing.T) {
	for _, tc := range []struct {
		exit   monitor.Exit
		code   int32
		reason string
	}{
		{monitor.Exit{Known: true}, 0, ReasonCompleted},
		{monitor.Exit{Known: true, Code: 3}, 3, ReasonError},
		{monitor.Exit{Known: true, Code: 137}, 137, ReasonError},
		{monitor.Exit{Known: true, Code: 137, OOMKilled: true}, 137, ReasonOOMKilled},
		{monitor.Exit{}, unknownCode, ReasonUnknown}, // nobody saw it: not 0
		{monitor.Exit{Code: 7}, unknownCode, ReasonUnknown},
	} {
		if code, reason := verdict(tc.exit); code != tc.code || reason != tc.reason {
			t.Errorf("%+v: %d, %s; want %d, %s", tc.exit, code, reason, tc.code, tc.reason)
		}
	}
}

func TestEndIsNotBeforeStart(t *testing.T) {
	m, _ := testManager(t)
	start := time.Now()
	c := m.all.Add(&Record{ID: "c", State: Running, StartedAt: start, Config: &runtime.ContainerConfig{}})
	if err := m.exited(c, monitor.Exit{Known: true, At: start.Add(-time.Millisecond)}, ""); err != nil {
		t.Fatal(err)
	}
	if r := c.Get(); r.FinishedAt.Before(r.StartedAt) {
		t.Errorf("started %s, finished %s", r.StartedAt, r.FinishedAt)
	}
	select {
	case <-c.Done():
	default:
		t.Error("an ended container's Done is open")
	}
}

func TestRecordsSurviveEncoding(t *testing.T) {
	r := &Record{
		ID: "id", Name: "pod_c_0", SandboxID: "pod", State: Running,
		Config:    &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "c"}, Annotations: map[string]string{"k": "v"}},
		Resources: &runtime.LinuxContainerResources{CpuShares: 5},
		Process:   monitor.Process{PID: 1, StartTime: 2},
	}
	raw, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got.Config, r.Config) || !proto.Equal(got.Resources, r.Resources) || got.Process != r.Process || got.State != r.State {
		t.Errorf("got %+v", got)
	}
	if r.RawConfig != nil {
		t.Error("encoding changed the record")
	}
}

func TestMergeOfResources(t *testing.T) {
	old := &runtime.LinuxContainerResources{
		CpuShares: 10, MemoryLimitInBytes: 100, CpusetCpus: "0",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}, {PageSize: "1GB", Limit: 3}},
		Unified:        map[string]string{"memory.high": "1"},
	}
	got := merge(old, &runtime.LinuxContainerResources{
		MemoryLimitInBytes: 200,
		HugepageLimits:     []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 2}},
		Unified:            map[string]string{"memory.min": "2"},
	})
	want := &runtime.LinuxContainerResources{
		CpuShares: 10, MemoryLimitInBytes: 200, CpusetCpus: "0",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 2}, {PageSize: "1GB", Limit: 3}},
		Unified:        map[string]string{"memory.high": "1", "memory.min": "2"},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if old.MemoryLimitInBytes != 100 {
		t.Error("the old resources were changed")
	}
}

// kubelet's retry of a CreateContainer that it gave up on.
func TestEssence(t *testing.T) {
	config := func(termination string, envs ...string) *runtime.ContainerConfig {
		c := &runtime.ContainerConfig{
			Annotations: map[string]string{"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"},
			Mounts: []*runtime.Mount{
				{ContainerPath: "/data", HostPath: "/a"},
				{ContainerPath: "/dev/termination-log", HostPath: termination},
			},
		}
		for _, e := range envs {
			c.Envs = append(c.Envs, &runtime.KeyValue{Key: e, Value: []byte(e)})
		}
		return c
	}
	first := config("/pods/1/abc", "A", "B")
	if retry := config("/pods/1/def", "B", "A"); !proto.Equal(essence(first), essence(retry)) {
		t.Error("a retry is not seen to be the same")
	}
	if other := config("/pods/1/abc", "A", "C"); proto.Equal(essence(first), essence(other)) {
		t.Error("another environment is not seen to be another")
	}
	other := config("/pods/1/abc", "A", "B")
	other.Mounts[0].HostPath = "/b"
	if proto.Equal(essence(first), essence(other)) {
		t.Error("another mount is not seen to be another")
	}
	if first.Mounts[1].HostPath == "" {
		t.Error("the config itself was changed")
	}
}
