package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/sys/capability"
	"github.com/sirupsen/logrus"
)

// The values of cgroup.driver.
const (
	DriverAuto     = "auto"
	DriverCgroupfs = "cgroupfs"
	DriverSystemd  = "systemd"
)

// libexecMonitor is where packages install podmon.
const libexecMonitor = "/usr/libexec/podshim/podmon"

// maxSocketPath is sizeof(sockaddr_un.sun_path) less the closing NUL, unix(7).
const maxSocketPath = 107

// messageRoom is kept free in a gRPC message for what is not output, bytes.
const messageRoom = 4 << 10

// Complete fills in what is derived from other keys (the socket, the cgroup
// driver and parent) and checks every value. All that is wrong is reported at
// once, one line "key: what is wrong" each. Completing twice changes nothing.
func (c *Config) Complete() error {
	if c.CRI.Socket == "" {
		c.CRI.Socket = filepath.Join(c.Run, "podshim.sock")
	}
	if c.Cgroup.Driver == DriverAuto || c.Cgroup.Driver == "" {
		c.Cgroup.Driver = detectDriver("/")
	}
	if c.Cgroup.Parent == "" {
		c.Cgroup.Parent = "/podshim"
		if c.Cgroup.Driver == DriverSystemd {
			c.Cgroup.Parent = "podshim.slice"
		}
	}
	return errors.Join(
		c.checkDirs(), c.checkLog(), c.checkCRI(), c.checkMetrics(), c.checkCgroup(),
		c.checkNetwork(), c.checkImage(), c.checkRuntime(),
	)
}

// detectDriver says who should make cgroups on the machine whose root directory
// is root: systemd where it is the init, which /run/systemd/system tells
// (sd_booted(3)).
func detectDriver(root string) string {
	if fi, err := os.Lstat(filepath.Join(root, "run/systemd/system")); err == nil && fi.IsDir() {
		return DriverSystemd
	}
	return DriverCgroupfs
}

// MonitorBinary returns the absolute path of the podmon executable, looked for
// as monitor.binary in default.toml says.
func (c *Config) MonitorBinary() (string, error) {
	if c.Monitor.Binary != "" {
		if err := executable(c.Monitor.Binary); err != nil {
			return "", fmt.Errorf("monitor.binary: %w", err)
		}
		return c.Monitor.Binary, nil
	}
	var tried []string
	if self, err := os.Executable(); err == nil {
		tried = append(tried, filepath.Join(filepath.Dir(self), "podmon"))
	}
	if path, err := exec.LookPath("podmon"); err == nil {
		tried = append(tried, path)
	}
	tried = append(tried, libexecMonitor)
	for _, path := range tried {
		if abs, err := filepath.Abs(path); err == nil && executable(abs) == nil {
			return abs, nil
		}
	}
	return "", fmt.Errorf("monitor.binary: podmon is not beside podshim (%s), in PATH, or at %s", filepath.Dir(tried[0]), libexecMonitor)
}

func executable(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not an executable file", path)
	}
	return nil
}

func (c *Config) checkDirs() error {
	var errs []error
	errs = append(errs, absolute("root", c.Root), absolute("run", c.Run))
	if within(c.Root, c.Run) || within(c.Run, c.Root) {
		errs = append(errs, fmt.Errorf("run: %s and root %s must not lie within each other: one outlives a reboot, the other does not", c.Run, c.Root))
	}
	return errors.Join(errs...)
}

// within reports whether path is dir or beneath it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func absolute(key, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s: %q is not an absolute path", key, path)
	}
	if filepath.Clean(path) == "/" {
		return fmt.Errorf("%s: / itself cannot be used", key)
	}
	return nil
}

func absoluteAll(key string, paths []string) error {
	var errs []error
	for _, p := range paths {
		errs = append(errs, absolute(key, p))
	}
	return errors.Join(errs...)
}

func (c *Config) checkLog() error {
	var errs []error
	if lvl, err := logrus.ParseLevel(c.Log.Level); err != nil || lvl < logrus.ErrorLevel {
		errs = append(errs, fmt.Errorf("log.level: %q is not one of trace, debug, info, warn, error", c.Log.Level))
	}
	errs = append(errs, oneOf("log.format", c.Log.Format, "text", "json"))
	return errors.Join(errs...)
}

func oneOf(key, value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return fmt.Errorf("%s: %q is not one of %s", key, value, strings.Join(allowed, ", "))
}

func (c *Config) checkCRI() error {
	errs := []error{absolute("cri.socket", c.CRI.Socket)}
	if len(c.CRI.Socket) > maxSocketPath {
		errs = append(errs, fmt.Errorf("cri.socket: %s has %d characters, a unix socket's path %d at most", c.CRI.Socket, len(c.CRI.Socket), maxSocketPath))
	}
	if _, err := netip.ParseAddr(c.CRI.StreamAddress); err != nil {
		errs = append(errs, fmt.Errorf("cri.stream_address: %q is not an IP address", c.CRI.StreamAddress))
	}
	if c.CRI.StreamPort < 0 || c.CRI.StreamPort > 65535 {
		errs = append(errs, fmt.Errorf("cri.stream_port: %d is not 0 to 65535", c.CRI.StreamPort))
	}
	return errors.Join(append(errs,
		positive("cri.stream_idle_timeout", c.CRI.StreamIdleTimeout),
		// Below a few kilobytes not even a Status would pass; gRPC counts in 31 bits.
		between("cri.max_message_size", c.CRI.MaxMessageSize, 64<<10, 1<<31-1),
		between("cri.exec_sync_output_limit", c.CRI.ExecSyncOutputLimit, 1<<10, max(1<<10, c.CRI.MaxMessageSize-messageRoom)),
	)...)
}

func (c *Config) checkMetrics() error {
	if c.Metrics.Address == "" {
		return nil
	}
	if _, err := netip.ParseAddrPort(c.Metrics.Address); err != nil {
		return fmt.Errorf("metrics.address: %q is not an IP address and a port", c.Metrics.Address)
	}
	return nil
}

func positive(key string, d Duration) error {
	if d.Std() <= 0 {
		return fmt.Errorf("%s: %s is not more than zero", key, d)
	}
	return nil
}

func between(key string, v, least, most int) error {
	if v < least || v > most {
		return fmt.Errorf("%s: %d is not %d to %d", key, v, least, most)
	}
	return nil
}

// slice is a systemd slice's name: dashes separate its ancestors, so none may
// stand at an end or beside another (systemd.slice(5)).
var slice = regexp.MustCompile(`^[A-Za-z0-9:_.\\]+(-[A-Za-z0-9:_.\\]+)*\.slice$`)

func (c *Config) checkCgroup() error {
	if err := oneOf("cgroup.driver", c.Cgroup.Driver, DriverCgroupfs, DriverSystemd); err != nil {
		return fmt.Errorf("%w, %s", err, DriverAuto)
	}
	if c.Cgroup.Driver == DriverSystemd {
		if !slice.MatchString(c.Cgroup.Parent) {
			return fmt.Errorf("cgroup.parent: %q is not the name of a slice, which the systemd driver needs (\"podshim.slice\")", c.Cgroup.Parent)
		}
		return nil
	}
	if strings.HasSuffix(c.Cgroup.Parent, ".slice") {
		return fmt.Errorf("cgroup.parent: %q is a slice, but the driver is cgroupfs, which needs a path (\"/podshim\")", c.Cgroup.Parent)
	}
	if filepath.Clean(c.Cgroup.Parent) != c.Cgroup.Parent {
		return fmt.Errorf("cgroup.parent: %q is not a plain path", c.Cgroup.Parent)
	}
	return absolute("cgroup.parent", c.Cgroup.Parent)
}

func (c *Config) checkNetwork() error {
	errs := []error{
		absolute("network.conf_dir", c.Network.ConfDir),
		absoluteAll("network.bin_dirs", c.Network.BinDirs),
		absolute("network.netns_dir", c.Network.NetnsDir),
		positive("network.plugin_timeout", c.Network.PluginTimeout),
	}
	if c.Network.ConfTemplate != "" {
		errs = append(errs, absolute("network.conf_template", c.Network.ConfTemplate))
	}
	if len(c.Network.BinDirs) == 0 {
		errs = append(errs, errors.New("network.bin_dirs: at least one directory is needed"))
	}
	return errors.Join(errs...)
}

func (c *Config) checkImage() error {
	errs := []error{
		absoluteAll("image.certs_dirs", c.Image.CertsDirs),
		between("image.max_concurrent_downloads", c.Image.MaxConcurrentDownloads, 1, 64),
		positive("image.pull_progress_timeout", c.Image.PullProgressTimeout),
	}
	if c.Image.InfraImage != "" {
		errs = append(errs, imageName("image.infra_image", c.Image.InfraImage))
	}
	for _, name := range c.Image.Pinned {
		errs = append(errs, imageName("image.pinned", name))
	}
	return errors.Join(errs...)
}

func imageName(key, name string) error {
	if _, err := reference.ParseDockerRef(name); err != nil {
		return fmt.Errorf("%s: %q is not an image name: %w", key, name, err)
	}
	return nil
}

// handlerName is what Kubernetes accepts in RuntimeClass.handler, a DNS label.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (c *Config) checkRuntime() error {
	r := c.Runtime
	var errs []error
	if _, ok := r.Handler(""); !ok {
		errs = append(errs, fmt.Errorf("runtime.default_handler: there is no table [runtime.handlers.%s]", r.DefaultHandler))
	}
	r.DefaultHandler = ""
	base, _ := r.Handler("")
	errs = append(errs, base.check("runtime"))
	names := make([]string, 0, len(r.Handlers))
	for name := range r.Handlers {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		key := "runtime.handlers." + name
		if !handlerName.MatchString(name) {
			errs = append(errs, fmt.Errorf("%s: %q cannot be the handler of a RuntimeClass (a to z, 0 to 9 and -, 63 at most)", key, name))
		}
		h, _ := r.Handler(name)
		errs = append(errs, h.check(key))
	}
	return errors.Join(errs...)
}

func (h Resolved) check(key string) error {
	var errs []error
	if h.NofileHard != 0 && h.NofileSoft > h.NofileHard {
		errs = append(errs, fmt.Errorf("%s.nofile_soft: %d is more than nofile_hard, %d", key, h.NofileSoft, h.NofileHard))
	}
	if h.PidsLimit < 0 {
		errs = append(errs, fmt.Errorf("%s.pids_limit: %d is negative; 0 is no limit", key, h.PidsLimit))
	}
	for _, name := range h.DefaultCapabilities {
		if !knownCapability(name) {
			errs = append(errs, fmt.Errorf("%s.default_capabilities: %q is not a capability such as \"CAP_CHOWN\"", key, name))
		}
	}
	if h.SeccompProfile != "" {
		errs = append(errs, absolute(key+".seccomp_profile", h.SeccompProfile))
	}
	return errors.Join(errs...)
}

func knownCapability(name string) bool {
	for _, c := range capability.ListKnown() {
		if name == "CAP_"+strings.ToUpper(c.String()) {
			return true
		}
	}
	return false
}
