package harness

import (
	"context"
	"crypto/sha512"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// leftovers finds what still bears one of the IDs on this machine.
func (d *daemon) leftovers(ids []string) []string {
	var found []string
	for _, p := range Processes(func(p Process) bool { return !p.initsZombie() && containsAny(p.Cgroup, ids) }) {
		found = append(found, fmt.Sprintf("process %v in %s", p, strings.TrimSpace(p.Cgroup)))
	}
	for _, m := range machineMounts() {
		if containsAny(m.Point, ids) {
			found = append(found, "mount "+m.Point)
		}
	}
	for _, top := range d.cgroupTops() {
		for _, dir := range cgroupsBelow(top) {
			if containsAny(filepath.Base(dir), ids) {
				found = append(found, "cgroup "+dir)
			}
		}
	}
	d.waitRecords(ids)
	for _, dir := range []string{d.Root, d.RunDir, d.NetnsDir} {
		found = append(found, filesNamed(dir, ids)...)
	}
	return append(found, d.reservations(ids)...)
}

// waitRecords gives podshim's flusher its time: a removed record's file stays as
// a mark until the removal is in the database as well.
func (d *daemon) waitRecords(ids []string) {
	dir := filepath.Join(d.RunDir, "state")
	for _, file := range filesNamed(dir, ids) {
		path := strings.TrimPrefix(file, "file ")
		_ = waitDir(filepath.Dir(path), func() bool {
			_, err := os.Lstat(path)
			return err != nil
		}, 5*time.Second)
	}
}

// filesNamed lists the files below dir whose names bear one of the IDs. What is
// inside image layers and root filesystems is not looked at.
func filesNamed(dir string, ids []string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if containsAny(e.Name(), ids) {
			found = append(found, "file "+path)
			if e.IsDir() {
				return fs.SkipDir
			}
		}
		if e.IsDir() && (e.Name() == "fs" || e.Name() == "rootfs" || e.Name() == "blobs") {
			return fs.SkipDir
		}
		return nil
	})
	return found
}

// reservations lists the IPs host-local still holds for one of the IDs; with no
// IDs, all of them.
func (d *daemon) reservations(ids []string) []string {
	var found []string
	files, _ := filepath.Glob(filepath.Join(d.IPAM, "*", "*"))
	for _, file := range files {
		name := filepath.Base(file)
		if name == "lock" || strings.HasPrefix(name, "last_reserved_ip") {
			continue
		}
		owner, _ := os.ReadFile(file)
		if len(ids) == 0 || containsAny(string(owner), ids) {
			found = append(found, "IP reservation "+file)
		}
	}
	return found
}

// pins are the mounts in the directory of network namespaces.
func (d *daemon) pins() []string {
	var points []string
	for _, m := range machineMounts() {
		if strings.HasPrefix(m.Point, d.NetnsDir) {
			points = append(points, m.Point)
		}
	}
	return points
}

func machineMounts() []Mount {
	data, _ := os.ReadFile("/proc/self/mountinfo")
	return parseMounts(string(data))
}

// State is everything of the node that a pod changes on this machine, as sorted
// lines. Two equal states say that nothing was left or lost in between.
func (n *Node) State() []string {
	n.t.Helper()
	lines := n.remains()
	for _, p := range n.processes() {
		lines = append(lines, fmt.Sprintf("process %d %s", p.PID, p.Name))
	}
	for _, dir := range []string{n.Root, n.RunDir} {
		lines = append(lines, tree(dir)...)
	}
	lines = append(lines, n.firewall()...)
	lines = append(lines, n.known()...)
	slices.Sort(lines)
	return lines
}

// known is what the runtime lists.
func (n *Node) known() []string {
	n.t.Helper()
	var lines []string
	ctx := n.Context()
	pods, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		n.t.Fatalf("list sandboxes: %v", err)
	}
	for _, p := range pods.Items {
		lines = append(lines, fmt.Sprintf("sandbox %s %v", p.Id, p.State))
	}
	containers, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		n.t.Fatalf("list containers: %v", err)
	}
	for _, c := range containers.Containers {
		lines = append(lines, fmt.Sprintf("container %s %v", c.Id, c.State))
	}
	images, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		n.t.Fatalf("list images: %v", err)
	}
	for _, i := range images.Images {
		lines = append(lines, fmt.Sprintf("image %s %v %v", i.Id, i.RepoTags, i.RepoDigests))
	}
	return lines
}

// tree lists the files below dir, layers' contents and databases' pages aside.
func tree(dir string) []string {
	var lines []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if e.IsDir() && path == filepath.Join(dir, "state") {
			return fs.SkipDir // records come and go by a flusher; known() lists them
		}
		lines = append(lines, "file "+path)
		if e.IsDir() && (e.Name() == "fs" || e.Name() == "rootfs" || e.Name() == "work") {
			return fs.SkipDir
		}
		return nil
	})
	return lines
}

// remains lists mounts, namespaces, links, reservations and cgroups of the node.
func (d *daemon) remains() []string {
	var found []string
	for _, m := range machineMounts() {
		// The directory of pinned namespaces is a mount of its own, made once and
		// kept, as that of `ip netns` is.
		if strings.HasPrefix(m.Point, d.Dir+"/") && m.Point != d.NetnsDir && m.Point != d.Root {
			found = append(found, "mount "+m.Point)
		}
	}
	pins, _ := os.ReadDir(d.NetnsDir)
	for _, e := range pins {
		found = append(found, "network namespace "+filepath.Join(d.NetnsDir, e.Name()))
	}
	for _, link := range d.ports() {
		found = append(found, "interface "+link+" on "+d.Bridge)
	}
	for _, top := range d.cgroupTops() {
		for _, dir := range cgroupsBelow(top) {
			own := dir == top || dir == filepath.Join(top, "daemon")
			for _, parent := range []string{d.PodsCgroup, d.OwnCgroup} {
				own = own || strings.HasSuffix(dir, CgroupPath(parent))
			}
			if !own {
				found = append(found, "cgroup "+dir)
			}
		}
	}
	return append(found, d.reservations(nil)...)
}

// ports lists the interfaces on the node's bridge. (Not by netlink: a change of any
// interface of the machine interrupts its lists, which may miss some then.)
func (d *daemon) ports() []string {
	entries, err := os.ReadDir("/sys/class/net/" + d.Bridge + "/brif")
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// firewall lists the iptables lines that bear the network's name or a chain that
// the bridge and portmap plugins name by a hash of network and sandbox.
func (d *daemon) firewall() []string {
	marks := []string{d.Name}
	d.mu.Lock()
	for id := range d.ids {
		hash := fmt.Sprintf("%x", sha512.Sum512([]byte(d.Name+id)))
		// plugins/pkg/utils: 28 characters, the prefix "CNI-" or "CNI-DN-" among them.
		marks = append(marks, "CNI-"+hash[:24], "CNI-DN-"+hash[:21])
	}
	d.mu.Unlock()
	var found []string
	for _, table := range []string{"nat", "filter"} {
		out, err := exec.Command("iptables-save", "-t", table).Output()
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(out)) {
			if containsAny(line, marks) {
				found = append(found, "iptables "+table+": "+strings.TrimSpace(line))
			}
		}
	}
	return found
}

// processes lists those that the daemon or its descendants started.
func (d *daemon) processes() []Process {
	return Processes(func(p Process) bool {
		if p.initsZombie() {
			return false
		}
		for line := range strings.Lines(p.Cgroup) {
			if strings.HasSuffix(strings.TrimSpace(line), ":/"+d.Name) || strings.Contains(line, ":/"+d.Name+"/") {
				return true
			}
		}
		return false
	})
}

// end takes the node down: pods first, then the daemon, then what is left,
// which is reported as errors of t.
func (d *daemon) end(t TB) {
	if d.conn != nil {
		if err := d.removeAllPods(); err != nil {
			t.Errorf("remove all pods: %v", err)
		}
		d.checkSnapshots(t)
		_ = d.conn.Close()
	}
	if err := d.signal(syscall.SIGTERM); err != nil {
		t.Errorf("stop daemon: %v", err)
		_ = d.signal(syscall.SIGKILL)
	}
	d.mu.Lock()
	var ids []string
	for id := range d.ids {
		ids = append(ids, id)
	}
	d.mu.Unlock()
	for _, leak := range d.remains() {
		t.Errorf("left on the machine: %s", leak)
	}
	for _, leak := range d.leftovers(ids) {
		t.Errorf("left on the machine: %s", leak)
	}
	for _, leak := range d.firewall() {
		t.Errorf("left on the machine: %s", leak)
	}
	for _, p := range d.processes() {
		// podmon outlives the daemon by design; it must hold no container.
		if !d.isMonitor(p) {
			t.Errorf("left on the machine: %v: %s", p, strings.ReplaceAll(p.Read("cmdline"), "\x00", " "))
		}
	}
	if t.Failed() {
		t.Logf("%s", d.tail(60))
	}
	if err := d.destroy(); err != nil {
		t.Errorf("take node down: %v", err)
	}
}

// isMonitor tells podmon from containers, and from what it is about to make one of:
// it never leaves the daemon's cgroup.
func (d *daemon) isMonitor(p Process) bool {
	return strings.Contains(p.Cgroup, "/"+d.Name+"/daemon\n") && strings.HasPrefix(p.Read("cmdline"), "podmon\x00serve\x00")
}

func (d *daemon) removeAllPods() error {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	pods, err := d.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		if _, err := d.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return fmt.Errorf("stop %s: %w", p.Id, err)
		}
		if _, err := d.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return fmt.Errorf("remove %s: %w", p.Id, err)
		}
	}
	return nil
}

// checkSnapshots removes all images; then no layer and no writable snapshot has
// a reason to be there.
func (d *daemon) checkSnapshots(t TB) {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	images, err := d.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		t.Errorf("list images: %v", err)
		return
	}
	for _, i := range images.Images {
		if _, err := d.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: i.Id}}); err != nil {
			t.Errorf("remove image %s: %v", i.Id, err)
		}
	}
	for _, dir := range d.waitNoSnapshots(10 * time.Second) {
		t.Errorf("left on the machine: snapshot %s", dir)
	}
}

// waitNoSnapshots returns the snapshots that are still there after the limit: the
// collection may run behind the call that removed the last image.
func (d *daemon) waitNoSnapshots(limit time.Duration) []string {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return []string{"unknown: " + err.Error()}
	}
	defer watch.Close()
	until := time.After(limit)
	for {
		dirs := d.SnapshotDirs()
		if len(dirs) == 0 {
			return nil
		}
		if err := watch.Add(filepath.Dir(dirs[0])); err != nil {
			return append(dirs, err.Error())
		}
		// What went away before the watch began raises no event.
		if len(d.SnapshotDirs()) < len(dirs) {
			continue
		}
		select {
		case <-watch.Events:
		case <-until:
			return dirs
		}
	}
}

// SnapshotDirs lists the directories of the overlay snapshotter: layers and containers' roots.
func (d *daemon) SnapshotDirs() []string {
	var dirs []string
	_ = filepath.WalkDir(d.Root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return nil
		}
		if filepath.Base(filepath.Dir(path)) == "snapshots" {
			dirs = append(dirs, path)
			return fs.SkipDir
		}
		return nil
	})
	return dirs
}

// destroy kills, unmounts and deletes whatever the node still has. Files are
// deleted only when no mount is left below them.
func (d *daemon) destroy() error {
	if err := d.halt(d.Dir); err != nil {
		return err
	}
	if d.opts.SmallRoot != "" {
		if err := unix.Unmount(d.Root, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", d.Root, err)
		}
	}
	if d.logs != nil {
		_ = d.logs.Close()
	}
	return os.RemoveAll(d.Dir)
}
