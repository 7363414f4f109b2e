package harness

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Limit bounds every single wait and call of the harness: far more than any
// should take on a loaded machine, far less than the test binary's own limit. The
// environment variable PODSHIM_TEST_PATIENCE multiplies it, for emulated machines.
var Limit = time.Duration(patience()) * 60 * time.Second

func patience() int {
	if n, err := strconv.Atoi(os.Getenv("PODSHIM_TEST_PATIENCE")); err == nil && n > 1 {
		return n
	}
	return 1
}

// TB is what the harness needs of a test; [Main] has one that is no test.
type TB interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Options say how a node differs from the usual one.
type Options struct {
	// Config is TOML put behind the harness's own: whole tables that it does not
	// write itself, such as [runtime.handlers.x].
	Config string
	// Runtime are lines for the table [runtime].
	Runtime string
	// CRI are lines for the table [cri].
	CRI string
	// Network are lines for the table [network].
	Network string
	// Image are lines for the table [image].
	Image string
	// NoNetwork leaves the CNI configuration directory empty.
	NoNetwork bool
	// IPMasq has the bridge plugin masquerade; it makes iptables rules and costs
	// 100 ms for each pod.
	IPMasq bool
	// PluginDirs are searched for CNI plugins before those of Tools.
	PluginDirs []string
	// PluginTimeout is how long a CNI plugin may run; "" is a third of Limit.
	PluginTimeout string
	// Spawn starts the daemon's process, if not nil, instead of cmd.Start; the
	// process must become the daemon.
	Spawn func(cmd *exec.Cmd) error
	// SmallRoot is the size of the filesystem that the root directory is on, as
	// mount(8) reads sizes; "" is the machine's own.
	SmallRoot string
	// SmallRootType is "ext4" for a filesystem on a loop device; "" is a tmpfs.
	SmallRootType string
	// NoPull leaves the image store empty; otherwise Busybox is pulled.
	NoPull bool
}

// Node is a private podshim as one test sees it.
type Node struct {
	*daemon
	t TB
}

// daemon is the process and all that belongs to it.
type daemon struct {
	// Runtime and Images are the CRI clients; they survive a Restart.
	Runtime cri.RuntimeServiceClient
	Images  cri.ImageServiceClient
	// Name is unique on this machine: the cgroup's and the CNI network's name.
	Name string
	// Dir holds all files; Root, RunDir, NetnsDir, LogRoot, CNIConf, IPAM and
	// Volumes are below it.
	Dir, Root, RunDir, NetnsDir, LogRoot, CNIConf, IPAM, Volumes, CertsD string
	// Socket is the CRI socket's path; Bridge and Subnet are the pods' network.
	Socket, Bridge, Subnet string
	// PodsCgroup is the cgroup parent pods get unless a test says otherwise, as
	// kubelet's kubepods; OwnCgroup that of pods whose config names none.
	PodsCgroup, OwnCgroup string

	opts Options
	// podmon is the monitor's program, once it is not the usual one.
	podmon  string
	conn    *grpc.ClientConn
	sockets sockets
	logs    *os.File
	// logStart is how long the log was when the daemon was last started.
	logStart int

	mu      sync.Mutex
	process *exec.Cmd
	exited  chan struct{} // closed when process has been reaped
	ids     map[string]bool
}

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t interface {
	Helper()
	Skip(args ...any)
}) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root (namespaces, cgroups, mounts)")
	}
}

// Start makes a node for one test and takes it down with it.
func Start(t TB, opts Options) *Node {
	t.Helper()
	d, err := newDaemon(opts)
	if d != nil {
		t.Cleanup(func() { d.end(t) })
	}
	if err == nil {
		err = d.start()
	}
	if err != nil {
		t.Fatalf("start node: %v\n%s", err, d.tail(40))
	}
	n := &Node{d, t}
	if !opts.NoPull {
		n.Pull(Busybox)
	}
	return n
}

// With is the same node as a subtest sees it: what it makes goes with it.
func (n *Node) With(t TB) *Node { return &Node{n.daemon, t} }

// Context ends when a call of a test has taken longer than any should.
func (n *Node) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	n.t.Cleanup(cancel)
	return ctx
}

func newDaemon(opts Options) (*daemon, error) {
	dir, err := os.MkdirTemp("", "podshim-test-")
	if err != nil {
		return nil, err
	}
	d := &daemon{
		Dir: dir, Name: "pst-" + randomHex(4), opts: opts, ids: map[string]bool{},
		Root: dir + "/root", RunDir: dir + "/run", NetnsDir: dir + "/netns", LogRoot: dir + "/logs",
		CNIConf: dir + "/net.d", IPAM: dir + "/ipam", Volumes: dir + "/volumes", CertsD: dir + "/certs.d",
	}
	d.Socket = d.RunDir + "/podshim.sock"
	d.Bridge = "pst" + strings.TrimPrefix(d.Name, "pst-")
	d.PodsCgroup, d.OwnCgroup = d.cgroup("", "pods"), d.cgroup("", "own")
	// The root of a user namespace must get through to what podshim gives it.
	if err := os.Chmod(dir, 0o711); err != nil {
		return d, err
	}
	return d, d.prepare()
}

func (d *daemon) prepare() error {
	for _, dir := range []string{d.Root, d.RunDir, d.NetnsDir, d.LogRoot, d.CNIConf, d.IPAM, d.Volumes} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if d.opts.SmallRoot != "" {
		if err := d.mountSmallRoot(); err != nil {
			return fmt.Errorf("mount root directory: %w", err)
		}
		if err := os.Chmod(d.Root, 0o711); err != nil {
			return err
		}
	}
	if err := d.makeCgroups(); err != nil {
		return err
	}
	var err error
	if d.Subnet, err = freeSubnet(); err != nil {
		return err
	}
	if !d.opts.NoNetwork {
		if err := d.WriteNetwork(); err != nil {
			return err
		}
	}
	if err := d.writeHosts(); err != nil {
		return err
	}
	if err := d.writeConfig(); err != nil {
		return err
	}
	// Once: a crictl that runs must not find it half written by another's test.
	crictl := "runtime-endpoint: unix://" + d.Socket + "\nimage-endpoint: unix://" + d.Socket + "\ntimeout: 60\n"
	if err := os.WriteFile(dir(d, "crictl.yaml"), []byte(crictl), 0o600); err != nil {
		return err
	}
	d.logs, err = os.OpenFile(dir(d, "podshim.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	return err
}

// mountSmallRoot mounts the filesystem of SmallRoot. A loop device goes with the mount.
func (d *daemon) mountSmallRoot() error {
	if d.opts.SmallRootType == "" {
		return unix.Mount("small", d.Root, "tmpfs", 0, "nr_inodes=8k,size="+d.opts.SmallRoot)
	}
	image := dir(d, "small")
	for _, args := range [][]string{
		{"truncate", "-s", strings.ToUpper(d.opts.SmallRoot), image},
		{"mkfs." + d.opts.SmallRootType, "-q", "-m", "0", "-N", "8192", image},
		{"mount", "-o", "loop", image, d.Root},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func (d *daemon) makeCgroups() error {
	for _, path := range []string{"/" + d.Name + "/daemon", d.PodsCgroup} {
		if err := MakeCgroup(path); err != nil {
			return err
		}
	}
	return nil
}

func dir(d *daemon, name string) string { return filepath.Join(d.Dir, name) }

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// freeSubnet picks a 10.21x.y.0/24 that no interface of this machine has.
func freeSubnet() (string, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	for errors.Is(err, netlink.ErrDumpInterrupted) { // by a change of another's: some may be missing
		addrs, err = netlink.AddrList(nil, netlink.FAMILY_V4)
	}
	if err != nil {
		return "", fmt.Errorf("list addresses: %w", err)
	}
	for range 100 {
		b := make([]byte, 2)
		_, _ = rand.Read(b)
		_, subnet, err := net.ParseCIDR(fmt.Sprintf("10.%d.%d.0/24", 210+b[0]%10, b[1]))
		if err != nil {
			return "", err
		}
		taken := false
		for _, a := range addrs {
			taken = taken || subnet.Contains(a.IP)
		}
		if !taken {
			return subnet.String(), nil
		}
	}
	return "", errors.New("no free subnet in 10.210.0.0 to 10.219.255.0")
}

// WriteNetwork puts the CNI configuration into its directory.
func (d *daemon) WriteNetwork() error {
	conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [
 {"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": %v, "hairpinMode": true,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`, d.Name, d.Bridge, d.opts.IPMasq, d.IPAM, d.Subnet)
	return os.WriteFile(d.CNIConf+"/10-test.conflist", []byte(conf), 0o600)
}

// writeHosts points RegistryHost at the loopback registry.
func (d *daemon) writeHosts() error {
	reg, err := LoopbackRegistry()
	if err != nil {
		return err
	}
	return d.WriteHosts(RegistryHost, "http://"+reg.Addr)
}

// WriteHosts sends pulls from a registry host to another address, by a hosts.toml.
func (d *daemon) WriteHosts(host, url string) error {
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", url, url)
	if err := os.MkdirAll(filepath.Join(d.CertsD, host), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.CertsD, host, "hosts.toml"), []byte(hosts), 0o600)
}

func (d *daemon) writeConfig() error {
	bin, err := Binaries()
	if err != nil {
		return err
	}
	tools, err := Tools()
	if err != nil {
		return err
	}
	driver := "cgroupfs"
	if Systemd {
		driver = "systemd"
	}
	var plugins []string
	for _, dir := range append(slices.Clone(d.opts.PluginDirs), tools) {
		plugins = append(plugins, strconv.Quote(dir))
	}
	conf := fmt.Sprintf(`root = %q
run = %q
[log]
level = "debug"
[cri]
socket = %q
%s
[monitor]
binary = %q
[cgroup]
driver = %q
parent = %q
[network]
conf_dir = %q
bin_dirs = [%s]
netns_dir = %q
plugin_timeout = %q
%s
[image]
certs_dirs = [%q]
%s
[runtime]
%s
%s
`, d.Root, d.RunDir, d.Socket, d.opts.CRI, bin+"/podmon", driver, d.OwnCgroup, d.CNIConf, strings.Join(plugins, ", "), d.NetnsDir,
		cmp.Or(d.opts.PluginTimeout, (Limit/3).String()), d.opts.Network, d.CertsD,
		d.opts.Image, d.opts.Runtime, d.opts.Config)
	return os.WriteFile(dir(d, "config.toml"), []byte(conf), 0o600)
}

// start runs the daemon and returns when it answers.
func (d *daemon) start() error {
	bin, err := Binaries()
	if err != nil {
		return err
	}
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watch.Close()
	if err := watch.Add(d.RunDir); err != nil {
		return err
	}
	if err := d.spawn(bin + "/podshim"); err != nil {
		return fmt.Errorf("start podshim: %w", err)
	}
	if err := d.waitSocket(watch); err != nil {
		return err
	}
	if d.conn == nil {
		if err := d.dial(); err != nil {
			return err
		}
	}
	return d.waitAnswer()
}

// waitAnswer returns when the daemon answers.
func (d *daemon) waitAnswer() error {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	for {
		// The socket is there a moment before it is listened on.
		_, err := d.Runtime.Version(ctx, &cri.VersionRequest{}, grpc.WaitForReady(true))
		if status.Code(err) != codes.Unavailable {
			return err
		}
		// The call was put on a connection to a daemon that was killed.
		select {
		case <-d.exited:
			return fmt.Errorf("podshim ended: %v", d.process.ProcessState)
		default:
		}
	}
}

// spawn starts the program in the node's cgroup, from where every process it
// ever starts can be told, whoever becomes its parent.
func (d *daemon) spawn(program string) error {
	root, err := unifiedRoot()
	if err != nil {
		return err
	}
	cgroup, err := os.Open(filepath.Join(root, d.Name, "daemon"))
	if err != nil {
		return err
	}
	defer cgroup.Close()
	d.logStart = len(d.Log())
	cmd := exec.Command(program, "--config", dir(d, "config.toml"))
	cmd.Stdout, cmd.Stderr = d.logs, d.logs
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Setpgid: true}
	// Without any of the environment's proxies or config hints.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}
	start := cmd.Start
	if d.opts.Spawn != nil {
		start = func() error { return d.opts.Spawn(cmd) }
	}
	if err := start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	d.mu.Lock()
	d.process, d.exited = cmd, exited
	d.mu.Unlock()
	return nil
}

// waitSocket returns when the CRI socket exists. After a kill the old socket
// file may still be there; then the first call waits for the daemon.
func (d *daemon) waitSocket(watch *fsnotify.Watcher) error {
	limit := time.After(Limit)
	for {
		if _, err := os.Stat(d.Socket); err == nil {
			return nil
		}
		select {
		case <-watch.Events:
		case err := <-watch.Errors:
			return fmt.Errorf("watch %s: %w", d.RunDir, err)
		case <-d.exited:
			return fmt.Errorf("podshim ended: %v", d.process.ProcessState)
		case <-limit:
			return fmt.Errorf("no socket %s after %v", d.Socket, Limit)
		}
	}
}

func (d *daemon) dial() error {
	conn, err := grpc.NewClient("unix://"+d.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		grpc.WithContextDialer(d.sockets.dial),
		grpc.WithUnaryInterceptor(d.noteIDs))
	if err != nil {
		return err
	}
	d.conn = conn
	d.Runtime, d.Images = cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
	return nil
}

// noteIDs remembers every sandbox and container the node has ever had, so that
// leaks can be searched for by ID.
func (d *daemon) noteIDs(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	var id string
	switch r := reply.(type) {
	case *cri.RunPodSandboxResponse:
		id = r.GetPodSandboxId()
	case *cri.CreateContainerResponse:
		id = r.GetContainerId()
	}
	if id != "" {
		d.mu.Lock()
		d.ids[id] = true
		d.mu.Unlock()
	}
	return err
}

// PID is the daemon's.
func (d *daemon) PID() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.process.Process.Pid
}

// signal sends to the daemon and waits until it has ended.
func (d *daemon) signal(sig syscall.Signal) error {
	d.mu.Lock()
	process, exited := d.process, d.exited
	d.mu.Unlock()
	if process == nil {
		return nil
	}
	if err := process.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-exited:
		return nil
	case <-time.After(Limit):
		return fmt.Errorf("podshim has not ended %v after %v", Limit, sig)
	}
}

// AwaitDisconnect returns when the client has noticed the daemon's end: until then it
// puts calls on a connection to nobody. A connection that was being made when the daemon
// ended may still become ready, and is waited for too. A child that the daemon has just
// forked has them as well, until it is another program.
func (n *Node) AwaitDisconnect() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	gone := n.sockets.await(ctx)
	for gone && n.conn.GetState() == connectivity.Ready {
		gone = n.conn.WaitForStateChange(ctx, connectivity.Ready)
	}
	if !gone {
		n.t.Fatalf("the client has not noticed podshim's end %v after it", Limit)
	}
}

// sockets are a client's connections that it has not closed.
type sockets struct {
	mu   sync.Mutex
	open []chan struct{} // closed with the connection
}

// socket is one of them.
type socket struct {
	net.Conn
	gone func()
}

func (s socket) Close() error {
	defer s.gone()
	return s.Conn.Close()
}

func (s *sockets) dial(ctx context.Context, path string) (net.Conn, error) {
	closed := make(chan struct{})
	s.mu.Lock()
	s.open = append(slices.DeleteFunc(s.open, func(c chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}), closed)
	s.mu.Unlock()
	gone := sync.OnceFunc(func() { close(closed) })
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(path, "unix://"))
	if err != nil {
		gone()
		return nil, err
	}
	return socket{conn, gone}, nil
}

// await waits until those that are open now are closed; false when ctx ends before.
func (s *sockets) await(ctx context.Context) bool {
	s.mu.Lock()
	open := slices.Clone(s.open)
	s.mu.Unlock()
	for _, closed := range open {
		select {
		case <-closed:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// Stop ends the daemon as an operator does; containers run on.
func (n *Node) Stop() {
	n.t.Helper()
	if err := n.signal(syscall.SIGTERM); err != nil {
		n.t.Fatalf("stop daemon: %v", err)
	}
}

// Kill ends the daemon with SIGKILL; containers run on.
func (n *Node) Kill() {
	n.t.Helper()
	if err := n.signal(syscall.SIGKILL); err != nil {
		n.t.Fatalf("kill daemon: %v", err)
	}
}

// Resume starts the daemon again, after Stop or Kill.
func (n *Node) Resume() {
	n.t.Helper()
	if err := n.start(); err != nil {
		n.t.Fatalf("start daemon again: %v\n%s", err, n.tail(40))
	}
}

// Launch starts the daemon again without waiting until it answers.
func (n *Node) Launch() {
	n.t.Helper()
	bin, err := Binaries()
	if err == nil {
		err = n.spawn(bin + "/podshim")
	}
	if err != nil {
		n.t.Fatalf("start daemon again: %v", err)
	}
}

// Await returns when the daemon answers, after Launch.
func (n *Node) Await() {
	n.t.Helper()
	if err := n.waitAnswer(); err != nil {
		n.t.Fatalf("start daemon again: %v\n%s", err, n.tail(40))
	}
}

// Restart is Stop and Resume.
func (n *Node) Restart() {
	n.t.Helper()
	n.Stop()
	n.Resume()
}

// Log is everything the daemon has logged.
func (d *daemon) Log() string {
	data, _ := os.ReadFile(dir(d, "podshim.log"))
	return string(data)
}

// WaitLog returns when the daemon has logged a line with all the parts since it was
// last started: what it does in the background has no other event.
func (n *Node) WaitLog(parts ...string) {
	n.t.Helper()
	if !n.ask(func() bool { return n.logged(parts) }) {
		n.t.Fatalf("no line with %q after %v\n%s", parts, Limit, n.tail(40))
	}
}

func (d *daemon) logged(parts []string) bool {
	for line := range strings.Lines(d.Log()[d.logStart:]) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) }) {
			return true
		}
	}
	return false
}

// tail is the end of the daemon's log; with ids, of the lines that name one.
func (d *daemon) tail(lines int, ids ...string) string {
	if d == nil {
		return ""
	}
	var kept []string
	for _, line := range strings.Split(strings.TrimSpace(d.Log()), "\n") {
		if len(ids) == 0 || containsAny(line, ids) {
			kept = append(kept, line)
		}
	}
	return "podshim's log:\n" + strings.Join(kept[max(0, len(kept)-lines):], "\n")
}

func containsAny(s string, parts []string) bool {
	for _, p := range parts {
		if strings.Contains(s, p) {
			return true
		}
	}
	return false
}

// Podshim is one of podshim's own commands with the node's configuration.
func (n *Node) Podshim(args ...string) *exec.Cmd {
	n.t.Helper()
	bin, err := Binaries()
	if err != nil {
		n.t.Fatalf("find podshim: %v", err)
	}
	return exec.Command(bin+"/podshim", append([]string{"--config", dir(n.daemon, "config.toml")}, args...)...)
}

// Crictl runs crictl against the node.
func (n *Node) Crictl(args ...string) *exec.Cmd {
	n.t.Helper()
	tools, err := Tools()
	if err != nil {
		n.t.Fatalf("find crictl: %v", err)
	}
	return exec.Command(filepath.Join(tools, "crictl"), append([]string{"--config", dir(n.daemon, "crictl.yaml")}, args...)...)
}

// Pull pulls an image and returns its reference as the store knows it.
func (n *Node) Pull(ref string) string {
	n.t.Helper()
	resp, err := n.Images.PullImage(n.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		n.t.Fatalf("pull %s: %v\n%s", ref, err, n.tail(20))
	}
	return resp.ImageRef
}

// NewImage pushes an image made from Busybox to the loopback registry, pulls it
// and returns its name.
func (n *Node) NewImage(name string, opts ImageOptions) string {
	n.t.Helper()
	reg, err := LoopbackRegistry()
	if err == nil {
		_, err = reg.Push(name, "1", opts)
	}
	if err != nil {
		n.t.Fatalf("push image %s: %v", name, err)
	}
	ref := RegistryHost + "/" + name + ":1"
	n.Pull(ref)
	return ref
}
