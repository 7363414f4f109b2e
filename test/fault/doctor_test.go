package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/image"
	records "github.com/podshim/podshim/internal/state"
	"github.com/podshim/podshim/test/harness"
)

// diagnosis is what `podshim doctor --json` prints.
type diagnosis struct {
	Daemon   bool      `json:"daemon"`
	Findings []finding `json:"findings"`
}

type finding struct {
	Kind     string `json:"kind"`
	Name     string `json:"name"`
	ID       string `json:"id"`
	Why      string `json:"why"`
	Remedy   string `json:"remedy"`
	Hint     string `json:"hint"`
	Repaired bool   `json:"repaired"`
	Error    string `json:"error"`
}

// names are the findings as "kind name", sorted.
func (d diagnosis) names() []string {
	var names []string
	for _, f := range d.Findings {
		names = append(names, f.Kind+" "+f.Name)
	}
	slices.Sort(names)
	return names
}

// doctor runs the doctor and checks what its exit code says.
func doctor(t *testing.T, n *harness.Node, args ...string) diagnosis {
	t.Helper()
	cmd := n.Podshim(append([]string{"doctor", "--json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var d diagnosis
	if jerr := json.Unmarshal(out, &d); jerr != nil {
		t.Fatalf("doctor: %v, %v\n%s%s", err, jerr, out, stderr.String())
	}
	left := 0
	for _, f := range d.Findings {
		if !f.Repaired {
			left++
		}
	}
	if want := min(left, 1); cmd.ProcessState.ExitCode() != want {
		t.Errorf("exit code %d with %d things left\n%s", cmd.ProcessState.ExitCode(), left, stderr.String())
	}
	return d
}

// patient is a node with a pod that runs, on which things are planted that do
// not belong there.
type patient struct {
	t       *testing.T
	n       *harness.Node
	pod     *harness.Pod
	before  string
	planted []planted
}

type planted struct {
	name string // as the doctor names it
	gone func() bool
}

func newPatient(t *testing.T) *patient {
	harness.NeedRoot(t)
	if harness.Systemd {
		t.Skip("SKIPPED: plants cgroups of the cgroupfs driver")
	}
	n := start(t, harness.Options{})
	p := &patient{t: t, n: n, pod: n.RunPod()}
	p.pod.Run([]string{"sleep", "100000"})
	own := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "" })
	own.Run([]string{"sleep", "100000"})
	p.before = p.life()
	return p
}

// life is what of the running pods must not change: processes, namespaces,
// reservations, mounts.
func (p *patient) life() string {
	var lines []string
	for _, proc := range harness.Processes(func(q harness.Process) bool { return strings.Contains(q.Cgroup, p.n.Name+"/") && q.State != "Z" }) {
		if proc.PID != p.n.PID() && !p.isPlanted(proc) {
			lines = append(lines, fmt.Sprintf("process %d/%d %s", proc.PID, proc.StartTime, proc.Namespace("net")))
		}
	}
	files, _ := filepath.Glob(filepath.Join(p.n.IPAM, "*", "*.*.*.*"))
	for _, file := range files {
		raw, _ := os.ReadFile(file)
		lines = append(lines, file+" "+string(raw))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (p *patient) isPlanted(proc harness.Process) bool {
	return slices.ContainsFunc(p.planted, func(o planted) bool { return strings.HasPrefix(o.name, fmt.Sprintf("process %d ", proc.PID)) })
}

func (p *patient) plant(kind, name string, gone func() bool) {
	p.planted = append(p.planted, planted{kind + " " + name, gone})
}

func (p *patient) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func noFile(path string) func() bool {
	return func() bool { _, err := os.Lstat(path); return errors.Is(err, fs.ErrNotExist) }
}

// plantFiles plants what lies in directories, each of an ID of its own.
func (p *patient) plantFiles() {
	n := p.n
	for _, home := range []string{n.RunDir + "/sandboxes", n.RunDir + "/containers", n.Root + "/sandboxes", n.Root + "/containers"} {
		path := filepath.Join(home, ids.New())
		p.must(os.MkdirAll(filepath.Join(path, "rootfs"), 0o700))
		p.plant("directory", path, noFile(path))
	}
	dir := filepath.Join(n.RunDir, "containers", ids.New())
	point := filepath.Join(dir, "rootfs")
	p.must(os.MkdirAll(point, 0o700))
	p.must(unix.Mount("orphan", point, "tmpfs", 0, ""))
	p.plant("directory", dir, noFile(dir))
	p.plant("mount", point, func() bool {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(point))
		return err == nil && len(mounts) == 0
	})
	for _, home := range []string{"containers", "state"} {
		id := ids.New()
		path := filepath.Join(n.RunDir, "monitor", home, id)
		p.must(os.MkdirAll(path, 0o700))
		p.plant("container", id, noFile(path))
	}
	snapshot := filepath.Join(n.Root, "images", "snapshots", "999999")
	p.must(os.MkdirAll(filepath.Join(snapshot, "fs"), 0o700))
	p.plant("snapshot's directory", snapshot, noFile(snapshot))
}

// plantNetwork plants what a pod's network leaves.
func (p *patient) plantNetwork() {
	n := p.n
	pin := filepath.Join(n.NetnsDir, "podshim-"+ids.New()[:16])
	p.must(cni.NewNetns(pin))
	p.plant("namespace", pin, noFile(pin))
	file := filepath.Join(n.NetnsDir, "podshim-"+ids.New()[:16]+"-user")
	p.must(os.WriteFile(file, nil, 0o444))
	p.plant("namespace", file, noFile(file))
	p.t.Cleanup(func() { _ = cni.Remove(pin); _ = cni.Remove(file) })

	ip := strings.TrimSuffix(n.Subnet, ".0/24") + ".250"
	path := filepath.Join(n.IPAM, n.Name, ip)
	p.must(os.WriteFile(path, []byte(ids.New()+"\r\neth0"), 0o644))
	p.plant("IP reservation", ip, noFile(path))
	ip = strings.TrimSuffix(ip, "250") + "251"
	path = filepath.Join(n.IPAM, n.Name, ip)
	p.must(os.WriteFile(path, nil, 0o644)) // by a plugin that was killed before it wrote
	p.plant("IP reservation", ip, noFile(path))

	// What the running pod was attached with, under the name of another.
	id := ids.New()
	cache := filepath.Join(n.Root, "cni")
	raw, err := os.ReadFile(filepath.Join(cache, "attachments", p.pod.ID+".json"))
	p.must(err)
	raw = bytes.ReplaceAll(raw, []byte(p.pod.ID), []byte(id))
	raw = bytes.ReplaceAll(raw, []byte(p.pod.ID[:16]), []byte(id[:16]))
	attachment := filepath.Join(cache, "attachments", id+".json")
	p.must(os.WriteFile(attachment, raw, 0o600))
	p.plant("network attachment", id, noFile(attachment))
	result := filepath.Join(cache, "results", n.Name+"-"+ids.New()+"-eth0")
	p.must(os.WriteFile(result, []byte("{}"), 0o600))
	p.plant("network result", result, noFile(result))

	bridge, err := netlink.LinkByName(n.Bridge)
	p.must(err)
	name := "veth" + ids.New()[:8]
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = name, bridge.Attrs().Index
	p.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p" + name[4:]}))
	p.t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	p.plant("veth", name, func() bool {
		_, err := netlink.LinkByName(name)
		return errors.As(err, new(netlink.LinkNotFoundError))
	})
}

// plantCgroups plants cgroups in every hierarchy, with processes and without:
// below podshim's own parent, and beside the containers of a pod that runs.
func (p *patient) plantCgroups() {
	id := ids.New()
	own := filepath.Join(p.n.OwnCgroup, "pod-"+id)
	inner := filepath.Join(own, ids.New())
	p.must(harness.MakeCgroup(inner))
	p.plantCgroup(own)
	p.plantCgroup(inner)
	p.plantProcess(exec.Command("sleep", "100000"), inner)

	beside := filepath.Join(p.n.PodsCgroup, ids.New())
	p.must(harness.MakeCgroup(beside))
	p.plantCgroup(beside)
	p.plantProcess(exec.Command("sleep", "100000"), beside)

	// On infra's root, and in no pod's cgroup.
	stray := exec.Command("/pause")
	stray.SysProcAttr = &syscall.SysProcAttr{Chroot: filepath.Join(p.n.RunDir, "infra", "rootfs")}
	stray.Dir = "/"
	p.plantProcess(stray, "")
}

func (p *patient) plantCgroup(path string) {
	p.plant("cgroup", path, func() bool { return len(harness.CgroupDirs(path)) == 0 })
}

// plantProcess starts a program and moves it to a cgroup, in every hierarchy.
func (p *patient) plantProcess(cmd *exec.Cmd, cgroup string) {
	p.t.Helper()
	p.must(cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	p.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	if cgroup != "" {
		for _, dir := range harness.CgroupDirs(cgroup) {
			p.must(os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0))
		}
	}
	q, err := harness.ReadProcess(cmd.Process.Pid)
	p.must(err)
	p.plant("process", fmt.Sprintf("%d (%s)", q.PID, q.Name), func() bool { return !q.Alive() })
}

// check has the doctor name what is planted, repair exactly that, and find
// nothing more.
func (p *patient) check(daemon bool) {
	p.t.Helper()
	var want []string
	for _, o := range p.planted {
		want = append(want, o.name)
	}
	slices.Sort(want)
	look := doctor(p.t, p.n)
	if got := look.names(); !slices.Equal(got, want) {
		p.t.Fatalf("found:\n%s\nplanted:\n%s\nmissed: %q\nnot planted: %q", strings.Join(got, "\n"), strings.Join(want, "\n"), missing(want, got), missing(got, want))
	}
	for _, f := range look.Findings {
		if f.Why == "" || f.Remedy == "" || f.Repaired {
			p.t.Errorf("a look says: %+v", f)
		}
	}
	if look.Daemon != daemon {
		p.t.Errorf("beside a daemon: %v", look.Daemon)
	}
	for _, o := range p.planted {
		if o.gone() {
			p.t.Errorf("a look has removed %s", o.name)
		}
	}
	repaired := doctor(p.t, p.n, "--repair")
	if got := repaired.names(); !slices.Equal(got, want) {
		p.t.Errorf("repaired:\n%s\nplanted:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, f := range repaired.Findings {
		if !f.Repaired || f.Error != "" {
			p.t.Errorf("not repaired: %+v", f)
		}
	}
	for _, o := range p.planted {
		if !o.gone() {
			p.t.Errorf("said to be repaired, and there: %s", o.name)
		}
	}
	if again := doctor(p.t, p.n); len(again.Findings) > 0 {
		p.t.Errorf("after the repair: %+v", again.Findings)
	}
	p.untouched()
}

func missing(of, from []string) []string {
	return slices.DeleteFunc(slices.Clone(of), func(s string) bool { return slices.Contains(from, s) })
}

func (p *patient) untouched() {
	p.t.Helper()
	if after := p.life(); after != p.before {
		p.t.Errorf("what runs has changed:\n%s\nbefore:\n%s", after, p.before)
	}
}

// Each kind of thing that can be where it does not belong is found beside a
// running daemon, with the reason, and removed, and nothing else is.
func TestDoctorBesideTheDaemon(t *testing.T) {
	p := newPatient(t)
	if d := doctor(t, p.n); len(d.Findings) > 0 || !d.Daemon {
		t.Fatalf("nothing is planted: %+v", d)
	}
	p.plantFiles()
	p.plantNetwork()
	p.plantCgroups()
	p.check(true)
	p.pod.Shell("echo still works").WaitExit()
}

// The same without a daemon, when what is in locked databases can be planted too.
func TestDoctorWithoutADaemon(t *testing.T) {
	p := newPatient(t)
	unwanted := p.n.NewImage("unwanted", harness.ImageOptions{Files: map[string]string{"/etc/unwanted": "1"}})
	id := p.n.Pull(unwanted)
	p.n.Kill()
	if d := doctor(t, p.n); len(d.Findings) > 0 || d.Daemon {
		t.Fatalf("nothing is planted: %+v", d)
	}
	p.plantSnapshot()
	p.plantLayer(id)
	p.plantFiles()
	p.plantNetwork()
	p.plantCgroups()
	p.check(false)
	p.n.Resume()
	p.untouched()
	if d := doctor(t, p.n); len(d.Findings) > 0 || !d.Daemon {
		t.Errorf("with the daemon again: %+v", d)
	}
	p.pod.Shell("echo still works").WaitExit()
}

func (p *patient) openImages() *image.Store {
	log := logrus.New()
	log.SetOutput(testWriter{p.t})
	s, err := image.Open(image.Config{Root: filepath.Join(p.n.Root, "images"), Log: logrus.NewEntry(log)})
	p.must(err)
	return s
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// plantSnapshot plants a container's writable layer.
func (p *patient) plantSnapshot() {
	s := p.openImages()
	img, err := s.Get(harness.Busybox)
	p.must(err)
	key := ids.New()
	_, err = s.Prepare(p.t.Context(), key, img)
	p.must(err)
	p.must(s.Close())
	p.plant("snapshot", key, func() bool {
		s, err := image.Inspect(image.Config{Root: filepath.Join(p.n.Root, "images")})
		p.must(err)
		defer s.Close()
		keys, err := s.Snapshots(context.Background())
		return err == nil && !slices.Contains(keys, key)
	})
}

// plantLayer plants layers by taking their image's record.
func (p *patient) plantLayer(id string) {
	s := p.openImages()
	img, err := s.Get(id)
	p.must(err)
	p.must(s.Close())
	db, err := bolt.Open(filepath.Join(p.n.Root, "images", "images.db"), 0o600, nil)
	p.must(err)
	p.must(db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("images")).DeleteBucket([]byte(id)) }))
	p.must(db.Close())
	p.plant("layer", img.ChainID.String(), func() bool {
		s, err := image.Inspect(image.Config{Root: filepath.Join(p.n.Root, "images")})
		p.must(err)
		defer s.Close()
		left, err := s.Leftovers(context.Background())
		return err == nil && len(left.Layers) == 0
	})
}

// An operator's shell in a running container, in none of its cgroups, belongs to it.
func TestDoctorLeavesAnOperatorsShell(t *testing.T) {
	p := newPatient(t)
	c := p.pod.Run([]string{"sleep", "100000"})
	p.before = p.life()
	shell := exec.Command("nsenter", "-t", fmt.Sprint(c.Process().PID), "-m", "-r", "--", "sleep", "99999")
	p.must(shell.Start())
	defer func() {
		_ = shell.Process.Kill()
		_ = shell.Wait()
	}()
	asked(t, "nsenter has executed the command", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", shell.Process.Pid))
		return err == nil && string(b) == "sleep\x0099999\x00"
	})
	look := func() {
		t.Helper()
		if d := doctor(t, p.n, "--repair"); len(d.Findings) > 0 {
			t.Errorf("named: %+v", d.Findings)
		}
		if q, err := harness.ReadProcess(shell.Process.Pid); err != nil || q.State == "Z" {
			t.Errorf("the operator's shell has been ended: %v", err)
		}
		p.untouched()
	}
	look()
	p.n.Stop()
	look()
	p.n.Resume()
}

// Layers that are not as they were unpacked are found, and by the repair brought again
// with the next pull, beside a daemon and without. What runs on one of them runs on.
func TestDoctorFindsDamagedLayers(t *testing.T) {
	p := newPatient(t)
	for name, daemon := range map[string]bool{"beside": true, "alone": false} {
		t.Run(name, func(t *testing.T) {
			n := p.n.With(t)
			short, zeroed := p.damageable(n, name+"-short"), p.damageable(n, name+"-zeroed")
			if d := doctor(t, n, "--contents"); len(d.Findings) > 0 {
				t.Fatalf("nothing is damaged: %+v", d.Findings)
			}
			p.must(os.Truncate(short.file, 3))
			p.must(os.WriteFile(zeroed.file, make([]byte, len(zeroed.content)), 0o644))
			if !daemon {
				n.Stop() // a kill would leave removed containers' snapshots, which go in the background
			}
			if got, want := doctor(t, n).names(), []string{"damaged layer " + short.layer}; !slices.Equal(got, want) {
				t.Errorf("a look at lengths finds %q, want %q", got, want)
			}
			want := []string{"damaged layer " + short.layer, "damaged layer " + zeroed.layer}
			slices.Sort(want)
			look := doctor(t, n, "--contents")
			if got := look.names(); !slices.Equal(got, want) {
				t.Errorf("a look at contents finds %q, want %q", got, want)
			}
			for _, f := range look.Findings {
				if !strings.Contains(f.Why, short.file) && !strings.Contains(f.Why, zeroed.file) || f.Remedy == "" || look.Daemon != daemon {
					t.Errorf("beside a daemon %t: %+v", look.Daemon, f)
				}
			}
			for _, f := range doctor(t, n, "--contents", "--repair").Findings {
				if !f.Repaired {
					t.Errorf("not repaired: %+v", f)
				}
			}
			if d := doctor(t, n, "--contents"); len(d.Findings) > 0 {
				t.Errorf("after the repair: %+v", d.Findings)
			}
			if !daemon {
				n.Resume()
			}
			p.untouched()
			for _, d := range []damageable{short, zeroed} {
				d.fetched(t, n)
			}
		})
	}
}

// damageable is an image with a file that can be damaged, and a container of it that runs.
type damageable struct {
	image, content, file, layer string
	process                     harness.Process
}

func (p *patient) damageable(n *harness.Node, name string) damageable {
	d := damageable{content: "what the image holds: " + name}
	d.image = n.NewImage("doctor/"+name, harness.ImageOptions{Files: map[string]string{"data/" + name: d.content}})
	files, err := filepath.Glob(filepath.Join(n.Root, "images", "snapshots", "*", "fs", "data", name))
	p.must(err)
	if len(files) != 1 {
		p.t.Fatalf("the image's file is at %q", files)
	}
	d.file = files[0]
	d.process = p.pod.Run([]string{"sleep", "100000"}, func(c *cri.ContainerConfig) { c.Image.Image = d.image }).Process()
	p.before = p.life()
	status, err := n.Images.ImageStatus(n.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: d.image}, Verbose: true})
	p.must(err)
	var info struct{ ChainID string }
	p.must(json.Unmarshal([]byte(status.Info["info"]), &info))
	d.layer = info.ChainID // the topmost layer is that of the files
	return d
}

// fetched checks that the image is gone until it is pulled, is whole then, and that
// the container of before runs on.
func (d damageable) fetched(t *testing.T, n *harness.Node) {
	t.Helper()
	asked, err := n.Images.ImageStatus(n.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: d.image}})
	if err != nil || asked.Image != nil {
		t.Errorf("the damaged image is there: %v, %v", asked, err)
	}
	n.Pull(d.image)
	c := n.RunPod().Run([]string{"cat", "/data/" + filepath.Base(d.file)}, func(c *cri.ContainerConfig) { c.Image.Image = d.image })
	c.WaitExit()
	if got := c.LogText("stdout"); got != d.content {
		t.Errorf("the file that is pulled again holds %q, want %q", got, d.content)
	}
	if d := doctor(t, n, "--contents"); len(d.Findings) > 0 {
		t.Errorf("after the pull: %+v", d.Findings)
	}
	if !d.process.Alive() {
		t.Errorf("%v ran on the damaged layer, and has ended", d.process)
	}
}

// An image's record that makes no sense any more.
func TestDoctorFindsDamagedImages(t *testing.T) {
	p := newPatient(t)
	name := p.n.NewImage("doctor/record", harness.ImageOptions{Files: map[string]string{"/etc/record": "1"}})
	id := p.n.Pull(name)
	p.n.Kill()
	db, err := bolt.Open(filepath.Join(p.n.Root, "images", "images.db"), 0o600, nil)
	p.must(err)
	p.must(db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("images")).Bucket([]byte(id)).Put([]byte("config"), []byte("{}"))
	}))
	p.must(db.Close())
	d := doctor(t, p.n)
	if !slices.Contains(d.names(), "damaged image "+id) {
		t.Errorf("found %q, damaged is %s", d.names(), id)
	}
	for _, f := range doctor(t, p.n, "--repair").Findings {
		if !f.Repaired {
			t.Errorf("not repaired: %+v", f)
		}
	}
	if d := doctor(t, p.n); len(d.Findings) > 0 {
		t.Errorf("after the repair: %+v", d.Findings)
	}
	p.n.Resume()
	p.untouched()
	p.n.Pull(name)
	p.pod.Run([]string{"cat", "/etc/record"}, func(c *cri.ContainerConfig) { c.Image.Image = name }).WaitLog("1")
}

// A record of what does not run, with nobody left who could tell of its end.
func TestDoctorFindsRecordsWithoutProcesses(t *testing.T) {
	p := newPatient(t)
	c := p.pod.Shell("sleep 100000")
	p.n.Kill()
	for _, q := range harness.Processes(func(q harness.Process) bool { return strings.Contains(q.Cgroup, p.n.Name+"/") && q.State != "Z" }) {
		p.must(q.Kill(unix.SIGKILL))
		p.must(q.WaitGone(harness.Limit))
	}
	p.must(os.RemoveAll(filepath.Join(p.n.RunDir, "monitor")))
	d := doctor(t, p.n)
	for _, id := range []string{p.pod.ID, c.ID} {
		if !slices.ContainsFunc(d.Findings, func(f finding) bool {
			return f.Kind == "record" && f.ID == id
		}) {
			t.Errorf("%s is not found among %q", id, d.names())
		}
	}
	doctor(t, p.n, "--repair")
	if d := doctor(t, p.n); len(d.Findings) > 0 {
		t.Errorf("after the repair: %+v", d.Findings)
	}
	p.n.Resume()
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.Reason != "Unknown" {
		t.Errorf("the container is %v, %s", s.State, s.Reason)
	}
	if s := p.pod.Status(); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the pod is %v", s.State)
	}
}

// What an unreadable record may stand for is nobody's to remove.
func TestDoctorLeavesWhatUnreadableRecordsStandFor(t *testing.T) {
	p := newPatient(t)
	p.n.Stop()
	id := ids.New()
	log := logrus.New()
	log.SetOutput(testWriter{t})
	store, err := records.Open(records.Config{Database: filepath.Join(p.n.Root, "state.db"), RunDir: filepath.Join(p.n.RunDir, "state"), Log: logrus.NewEntry(log)})
	p.must(err)
	p.must(store.Put(records.Sandboxes, id, []byte("{")))
	p.must(store.Close())
	dir := filepath.Join(p.n.RunDir, "sandboxes", id)
	p.must(os.MkdirAll(dir, 0o700))
	pin := filepath.Join(p.n.NetnsDir, "podshim-"+id[:16])
	p.must(cni.NewNetns(pin))
	p.t.Cleanup(func() { _ = cni.Remove(pin); _ = os.RemoveAll(dir) })
	want := []string{"directory " + dir, "namespace " + pin, "record sandboxes/" + id}
	for _, mode := range []string{"alone", "beside"} {
		for _, args := range [][]string{nil, {"--repair"}} {
			if got := doctor(t, p.n, args...); !slices.Equal(got.names(), want) || slices.ContainsFunc(got.Findings, func(f finding) bool { return f.Repaired || f.Remedy != "" || f.Hint == "" }) {
				t.Errorf("%s %q: %+v", mode, args, got)
			}
		}
		if mode == "alone" {
			p.n.Resume()
		}
	}
	for _, path := range []string{dir, pin} {
		if noFile(path)() {
			t.Errorf("%s is removed", path)
		}
	}
	p.untouched()
	// Take the record away again, as an operator would.
	p.n.Stop()
	store, err = records.Open(records.Config{Database: filepath.Join(p.n.Root, "state.db"), RunDir: filepath.Join(p.n.RunDir, "state"), Log: logrus.NewEntry(log)})
	p.must(err)
	p.must(store.Delete(records.Sandboxes, id))
	p.must(store.Close())
	p.n.Resume()
	doctor(t, p.n, "--repair")
	for _, path := range []string{dir, pin} {
		if !noFile(path)() {
			t.Errorf("%s is nobody's now, and there still", path)
		}
	}
}

// While pods come and go as fast as they can nothing is ever named.
func TestDoctorUnderChurn(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	unwanted := n.NewImage("churned", harness.ImageOptions{Files: map[string]string{"/etc/churned": "1"}})
	var pods atomic.Int64
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			for range times(60, 8) {
				if err := churnOnce(n, i%2 == 0); err != nil {
					t.Errorf("churn: %v", err)
					return
				}
				pods.Add(1)
			}
		})
	}
	clients.Go(func() { // images too
		for range times(60, 8) {
			ctx := n.Context()
			if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: unwanted}}); err != nil {
				t.Errorf("remove image: %v", err)
			}
			if _, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: unwanted}}); err != nil {
				t.Errorf("pull image: %v", err)
			}
		}
	})
	done := make(chan struct{})
	go func() { clients.Wait(); close(done) }()
	looks := 0
	for over := false; !over; looks++ {
		select {
		case <-done:
			over = true // and once more
		default:
		}
		args := []string{}
		if looks%2 == 1 {
			args = append(args, "--repair")
		}
		if d := doctor(t, n, args...); len(d.Findings) > 0 {
			t.Errorf("named while pods come and go: %+v", d.Findings)
		}
	}
	t.Logf("%d looks while %d pods came and went", looks, pods.Load())
}

// churnOnce runs a pod with a container and removes it.
func churnOnce(n *harness.Node, own bool) error {
	ctx := n.Context()
	config := n.PodConfig(func(c *cri.PodSandboxConfig) {
		if own {
			c.Linux.CgroupParent = ""
		}
	})
	sandbox, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return err
	}
	id := sandbox.PodSandboxId
	c, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: id, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: harness.Busybox}, Command: []string{"sleep", "100000"},
		Linux: &cri.LinuxContainerConfig{},
	}})
	if err != nil {
		return err
	}
	if _, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return err
	}
	if _, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ContainerId, Cmd: []string{"true"}}); err != nil {
		return err
	}
	if _, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err = n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
