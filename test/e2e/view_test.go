package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/images"
)

// P1: a pod in the host's namespaces.
func testHostNamespaces(t *testing.T, k *Kubelet) {
	p := k.Run("host-namespaces")
	p.WaitReady()
	look, host := p.Process("look"), self(t)
	for _, kind := range []string{"net", "pid", "ipc", "uts", "user"} {
		if look.Namespace(kind) != host.Namespace(kind) {
			t.Errorf("%s namespace is %s, the host's is %s", kind, look.Namespace(kind), host.Namespace(kind))
		}
	}
	if look.Namespace("mnt") == host.Namespace("mnt") {
		t.Error("the container has the host's mounts")
	}
	p.WaitLog("look", "pause")
	// Its address is the node's, from which calls go out. kubelet names no IP of such a pod
	// without an API server.
	out, err := net.Dial("udp", "192.0.2.1:9") // sends nothing
	if err != nil {
		t.Skipf("SKIPPED: the node has no way out: %v", err)
	}
	defer out.Close()
	ip := out.LocalAddr().(*net.UDPAddr).IP.String()
	if log := p.Exec("look", "ip", "addr"); !strings.Contains(log, "inet "+ip+"/") {
		t.Errorf("the pod does not have the node's address %s:\n%s", ip, log)
	}
}

// securityContext: a user, no capabilities, no way to gain any, a filter, a
// read-only root.
func testRestricted(t *testing.T, k *Kubelet) {
	p := k.Run("restricted")
	p.WaitReady()
	c := p.Process("restricted")
	log := p.WaitLog("restricted", "file\n")
	for _, want := range []string{"uid=1000(tester) gid=1000(tester)", "2000", "3000", "Read-only file system"} {
		if !strings.Contains(strings.ReplaceAll(log, "uid=1000 gid=1000", "uid=1000(tester) gid=1000(tester)"), want) {
			t.Errorf("the container does not say %q:\n%s", want, log)
		}
	}
	for field, want := range map[string]string{
		"Uid": "1000\t1000\t1000\t1000", "Gid": "1000\t1000\t1000\t1000", "NoNewPrivs": "1", "Seccomp": "2",
		"CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapPrm": "0000000000000000", "CapAmb": "0000000000000000",
	} {
		if got := c.Status(field); got != want {
			t.Errorf("%s of the process is %q, want %q", field, got, want)
		}
	}
	groups := strings.Fields(c.Status("Groups"))
	for _, want := range []string{"2000", "3000"} {
		if !strings.Contains(" "+strings.Join(groups, " ")+" ", " "+want+" ") {
			t.Errorf("groups of the process are %v, want %s among them", groups, want)
		}
	}
	root, _ := c.MountAt("/")
	if !strings.Contains(" "+strings.Join(root.Options, " ")+" ", " ro ") {
		t.Errorf("the root filesystem is mounted %v", root.Options)
	}
	if scratch, ok := c.MountAt("/scratch"); !ok || scratch.Type != "tmpfs" || !strings.Contains(strings.Join(scratch.Super, ","), "size=1024k") {
		t.Errorf("scratch is %+v, want a tmpfs of 1 Mi", scratch)
	}
}

// Names: hostname, /etc/hosts, /etc/resolv.conf.
func testNames(t *testing.T, k *Kubelet) {
	p := k.Run("names")
	status := p.WaitReady()
	log := p.WaitLog("look", "nameserver")
	if !strings.HasPrefix(log, "alpha\n") {
		t.Errorf("the host's name is not the pod's:\n%s", log)
	}
	resolv := p.Exec("look", "cat", "/etc/resolv.conf")
	for _, want := range []string{"nameserver 192.0.2.1\nnameserver 192.0.2.2\n", "search one.example two.example\n", "options ndots:2\n"} {
		if !strings.Contains(resolv, want) {
			t.Errorf("resolv.conf has no %q:\n%s", want, resolv)
		}
	}
	hosts := p.Exec("look", "cat", "/etc/hosts")
	for _, want := range []string{"10.9.8.7\telsewhere\telsewhere.example", status.Status.PodIP + "\talpha", "127.0.0.1\tlocalhost"} {
		if !strings.Contains(hosts, want) {
			t.Errorf("/etc/hosts has no %q:\n%s", want, hosts)
		}
	}
}

// A user namespace of the pod, with ID-mapped volumes.
func testUserNamespace(t *testing.T, k *Kubelet) {
	p := k.Run("user-namespace")
	status := p.WaitReady()
	log := p.WaitLog("one", "done\n")
	if !strings.HasPrefix(log, "uid=0") {
		t.Errorf("the container is not root to itself:\n%s", log)
	}
	one, two := p.Process("one"), p.Process("two")
	infra, _ := p.Infra()
	host := self(t).Namespace("user")
	if u := one.Namespace("user"); u == host || u != two.Namespace("user") || u != infra.Namespace("user") {
		t.Errorf("user namespaces: host %s, infra %s, one %s, two %s", host, infra.Namespace("user"), u, two.Namespace("user"))
	}
	uid, err := strconv.Atoi(strings.Fields(one.Status("Uid"))[0])
	if err != nil || uid < 65536 {
		t.Errorf("root of the container is %d on the host, %v", uid, err)
	}
	listing := p.WaitLog("two", "file")
	if fields := strings.Fields(linesWith(listing, "file")); len(fields) < 4 || fields[2] != "33" || fields[3] != "33" {
		t.Errorf("the volume's file is, from the other container,\n%s", listing)
	}
	// On the host's disk the file is the mapped user's as kubelet wants it: 33.
	path := k.Root + "/pods/" + status.Metadata.UID + "/volumes/kubernetes.io~empty-dir/shared/file"
	if owner, err := ownerOf(path); err != nil || owner != 33 {
		t.Errorf("on the host the volume's file belongs to %d, %v; an ID-mapped mount keeps 33", owner, err)
	}
}

// P7: one directory, mounted where each container likes.
func testVolume(t *testing.T, k *Kubelet) {
	p := k.Run("volume")
	status := p.WaitReady()
	log := p.WaitLog("reader", "20")
	p.WaitLog("reader", "Read-only file system")
	dir := k.Root + "/pods/" + status.Metadata.UID + "/volumes/kubernetes.io~empty-dir/shared"
	var volume, out, in unix.Stat_t
	for path, st := range map[string]*unix.Stat_t{
		dir: &volume, p.Process("writer").Path("root/out"): &out, p.Process("reader").Path("root/in"): &in,
	} {
		if err := unix.Stat(path, st); err != nil {
			t.Fatal(err)
		}
	}
	if out.Ino != volume.Ino || in.Ino != volume.Ino || out.Dev != volume.Dev || in.Dev != volume.Dev {
		t.Errorf("%s is inode %d, and %d and %d in the containers; want one directory", dir, volume.Ino, out.Ino, in.Ino)
	}
	if !strings.Contains(p.Exec("writer", "cat", "/out/now"), "20") {
		t.Errorf("reader's log is %q", log)
	}
	if _, err := p.TryExec("reader", "touch", "/in/x"); err == nil {
		t.Error("the reader may write")
	}
}

// Volumes of many kinds.
func testVolumes(t *testing.T, k *Kubelet) {
	// Mounts propagate from and to a shared mount only; systemd makes all of them
	// so, this machine has no systemd.
	host := k.Dir + "/host-volume"
	shareDir(t, host)
	// The mounter has the time to unmount it.
	p := k.Run("volumes", "/tmp/podshim-volumes-example", host, "\nspec:\n", "\nspec:\n  terminationGracePeriodSeconds: 20\n")
	status := p.WaitReady()
	log := p.WaitLog("look", "looked\n")
	for _, want := range []string{`colour="blue"`, "67108864", "\nfile\n", "/usr/sbin/nginx", "/image-part/nginx"} {
		if !strings.Contains(log, want) {
			t.Errorf("the container does not say %q:\n%s", want, log)
		}
	}
	look := p.Process("look")
	for point, want := range map[string]string{"/memory": "tmpfs", "/image": "overlay"} {
		if m, ok := look.MountAt(point); !ok || m.Type != want {
			t.Errorf("%s is %+v, want type %s", point, m, want)
		}
	}
	for _, point := range []string{"/pod-info", "/image", "/image-part"} {
		if m, _ := look.MountAt(point); len(m.Options) == 0 || m.Options[0] != "ro" {
			t.Errorf("%s is mounted %v, want read-only", point, m.Options)
		}
	}
	if m, _ := look.MountAt("/memory"); !strings.Contains(strings.Join(m.Super, ","), "size=8192k") {
		t.Errorf("the tmpfs has %v, want 8 Mi", m.Super)
	}
	if data, err := os.ReadFile(host + "/look"); err != nil || string(data) != "from look\n" {
		t.Errorf("the host reads %q, %v", data, err)
	}
	part := k.Root + "/pods/" + status.Metadata.UID + "/volumes/kubernetes.io~empty-dir/disk/sub/file"
	if data, err := os.ReadFile(part); err != nil || string(data) != "part\n" {
		t.Errorf("what went through the subPath is %q, %v", data, err)
	}
	p.WaitLog("watcher", "saw the mount\n")
	if !exists(host + "/mnt/here") {
		t.Error("the host does not see the mount of the Bidirectional volume")
	}
	if _, ok := look.MountAt("/host/mnt"); ok {
		t.Error("a volume without propagation has the mount as well")
	}
	mounter := p.Process("mounter")
	p.Remove()
	if err := mounter.WaitGone(Limit); err != nil {
		t.Error(err)
	}
	if exists(host + "/mnt/here") {
		t.Error("the host still has the mount that the container has unmounted")
	}
}

// Paths of the host, by the types that kubelet knows; one of another type is not mounted.
func testHostPaths(t *testing.T, k *Kubelet) {
	host := t.TempDir()
	if err := os.Mkdir(host+"/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{host + "/file", host + "/dir/inside"} {
		if err := os.WriteFile(file, []byte("of the host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	socket, err := net.Listen("unix", host+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	p := k.Run("host-paths", "/tmp/podshim-host-paths", host)
	p.WaitReady()
	log := p.WaitLog("look", "looked\n")
	for _, want := range []string{"of the host\n", "inside\n", "a socket\n", "a device\n", "No space left on device", "/look/any/x: Read-only file system"} {
		if !strings.Contains(log, want) {
			t.Errorf("the container does not say %q:\n%s", want, log)
		}
	}
	for _, file := range []string{"/new-file", "/new-dir/file"} {
		if data, err := os.ReadFile(host + file); err != nil || string(data) != "written\n" {
			t.Errorf("the host reads %q from %s, %v", data, file, err)
		}
	}
	wrong := k.RunManifest(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: wrong-path
spec:
  volumes:
  - {name: dir, hostPath: {path: %s, type: Directory}}
  containers:
  - name: never
    image: %s
    command: [sleep, "1000000"]
    volumeMounts:
    - {name: dir, mountPath: /dir}
`, host+"/file", images.Busybox))
	if !k.ask(func() bool { return strings.Contains(k.tail(1000, "wrong-path"), "hostPath type check failed") }) {
		t.Errorf("kubelet does not say what is wrong:\n%s", k.tail(20, "wrong-path"))
	}
	if c := wrong.Status().Container("never"); c.ID() != "" || c.State.Running != nil {
		t.Errorf("%v, want it not created", c)
	}
}

// A disk of the host's, for a container that may use it; another one sees it and no more.
func testBlockDevice(t *testing.T, k *Kubelet) {
	disk := t.TempDir() + "/disk"
	content := make([]byte, 1<<20)
	copy(content, "of the disk\n")
	if err := os.WriteFile(disk, content, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", disk).Output()
	if err != nil {
		t.Skipf("SKIPPED: this machine has no loop device: %v", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", device, err, out)
		}
	})
	p := k.Run("block-device", "/dev/loop0", device)
	p.WaitReady()
	if log := p.WaitLog("uses", "looked\n"); log != "of the disk\nlooked\n" {
		t.Errorf("the container that may use the disk says\n%s", log)
	}
	if log := p.WaitLog("sees", "looked\n"); !strings.HasPrefix(log, "a disk\n") || !strings.Contains(log, "Operation not permitted") {
		t.Errorf("the container that may not use the disk says\n%s", log)
	}
	// Its number is the host's, and kept from the other by the devices' cgroup alone.
	var there, here unix.Stat_t
	for path, st := range map[string]*unix.Stat_t{device: &here, p.Process("sees").Path("root/disk"): &there} {
		if err := unix.Stat(path, st); err != nil {
			t.Fatal(err)
		}
	}
	if here.Rdev != there.Rdev || there.Mode&unix.S_IFMT != unix.S_IFBLK {
		t.Errorf("the container's device is %x with mode %o, the host's %x", there.Rdev, there.Mode, here.Rdev)
	}
}

// shareDir makes a directory that is a shared mount, for as long as the test.
func shareDir(t *testing.T, dir string) {
	t.Helper()
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		err = unix.Mount(dir, dir, "", unix.MS_BIND, "")
	}
	if err == nil {
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", dir, err)
			}
		})
		err = unix.Mount("", dir, "", unix.MS_SHARED, "")
	}
	if err != nil {
		t.Fatalf("make a shared mount: %v", err)
	}
}

// The full name as the hostname.
func testFQDN(t *testing.T, k *Kubelet) {
	p := k.Run("fqdn")
	status := p.WaitReady()
	const name = "alpha.greek.default.svc." + clusterDomain
	log := p.WaitLog("look", status.Status.PodIP)
	if !strings.HasPrefix(log, name+"\n") || !strings.Contains(log, status.Status.PodIP+"\t"+name+"\talpha\n") {
		t.Errorf("the name and /etc/hosts are\n%s\nwant %s", log, name)
	}
	if got := strings.TrimSpace(p.Process("look").Read("root/proc/sys/kernel/hostname")); got == name {
		t.Error("the host has the pod's name")
	}
}

// Groups of the process, and of a volume.
func testGroups(t *testing.T, k *Kubelet) {
	p := k.Run("groups")
	status := p.WaitReady()
	log := p.WaitLog("strict", "looked\n")
	groups := strings.Fields(p.Process("strict").Status("Groups"))
	slices.Sort(groups)
	if !slices.Equal(groups, []string{"1000", "2000", "3000"}) {
		t.Errorf("groups of the process are %v, want its own, fsGroup and the supplementary one; it says\n%s", groups, log)
	}
	volume := k.Root + "/pods/" + status.Metadata.UID + "/volumes/kubernetes.io~empty-dir/owned"
	for _, path := range []string{volume, volume + "/file", volume + "/dir"} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if gid := info.Sys().(*syscall.Stat_t).Gid; gid != 2000 {
			t.Errorf("%s belongs to group %d, want 2000", path, gid)
		}
		if info.IsDir() && info.Mode()&os.ModeSetgid == 0 {
			t.Errorf("%s has mode %v, want set-group-ID", path, info.Mode())
		}
	}
}

// Sysctls of the pod's namespaces; the host's stay.
func testSysctls(t *testing.T, k *Kubelet) {
	files := []string{"net/ipv4/ip_local_port_range", "net/ipv4/ip_unprivileged_port_start", "kernel/shm_rmid_forced"}
	read := func() (all string) {
		for _, file := range files {
			data, _ := os.ReadFile("/proc/sys/" + file)
			all += string(data)
		}
		return all
	}
	before := read()
	p := k.Run("sysctls")
	p.WaitReady()
	const want = "20000\t20999\n81\n1\n"
	if log := p.WaitLog("look", "81\n1\n"); log != want {
		t.Errorf("the pod has %q, want %q", log, want)
	}
	if now := read(); now != before || now == want {
		t.Errorf("the host had %q and has %q", before, now)
	}
}

// Capabilities and the system call filter, as the kernel has them of each process.
func testCapabilities(t *testing.T, k *Kubelet) {
	p := k.Run("capabilities")
	p.WaitReady()
	const (
		mknod    = 1 << unix.CAP_MKNOD
		netAdmin = 1 << unix.CAP_NET_ADMIN
		usual    = 0xa80425fb // what containerd and Docker give
	)
	all, _ := strconv.ParseUint(self(t).Status("CapBnd"), 16, 64)
	for name, want := range map[string]struct {
		effective, bounding uint64
		seccomp             string
	}{
		"one-more":   {usual&^mknod | netAdmin, usual&^mknod | netAdmin, "0"},
		"nobody":     {0, usual, "0"},
		"privileged": {all, all, "0"},
		"unconfined": {usual, usual, "0"},
	} {
		c := p.Process(name)
		effective, _ := strconv.ParseUint(c.Status("CapEff"), 16, 64)
		bounding, _ := strconv.ParseUint(c.Status("CapBnd"), 16, 64)
		if effective != want.effective || bounding != want.bounding || c.Status("Seccomp") != want.seccomp {
			t.Errorf("%s has effective %x, bounding %x, seccomp %s; want %x, %x, %s", name,
				effective, bounding, c.Status("Seccomp"), want.effective, want.bounding, want.seccomp)
		}
	}
}

// procMount: masks on /proc, or none.
func testProcMount(t *testing.T, k *Kubelet) {
	p := k.Run("proc-mount")
	p.WaitReady()
	below := func(container string) (points []string) {
		for _, m := range p.Process(container).Mounts() {
			if strings.HasPrefix(m.Point, "/proc/") {
				points = append(points, m.Point)
			}
		}
		return points
	}
	if points := below("unmasked"); len(points) != 0 {
		t.Errorf("the unmasked one has mounts at %v", points)
	}
	points := below("masked")
	for _, want := range []string{"/proc/sys", "/proc/irq", "/proc/timer_list"} {
		if !slices.Contains(points, want) {
			t.Errorf("the masked one has mounts at %v, want %s among them", points, want)
		}
	}
}

// A hostPort leads to the pod.
func testPorts(t *testing.T, k *Kubelet) {
	p := k.Run("ports")
	p.WaitReady()
	for _, address := range []string{gateway(t, p) + ":8088", "127.0.0.1:8088"} {
		var answer string
		if !k.ask(func() bool { // a pod without a readiness probe is ready before it listens
			resp, err := http.Get("http://" + address + "/")
			if err != nil {
				answer = err.Error()
				return false
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			answer = string(body)
			return strings.Contains(answer, "nginx")
		}) {
			t.Errorf("%s answers %q", address, answer)
		}
	}
}

// gateway is the host's address on the pods' bridge, as the pod knows it.
func gateway(t *testing.T, p *Pod) string {
	t.Helper()
	for line := range strings.Lines(p.Exec("web", "ip", "route")) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "default" {
			return fields[2]
		}
	}
	t.Fatal("the pod has no default route")
	return ""
}

func ownerOf(path string) (int, error) {
	info, err := os.Stat(path)
	if err != nil {
		return -1, err
	}
	return int(info.Sys().(*syscall.Stat_t).Uid), nil
}
