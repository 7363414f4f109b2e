package peer

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/podshim/podshim/test/private"
)

// StartCRIO runs the CRI-O of a directory that holds pinns and runc as well;
// conmon is the system's. CRI-O reads no hosts.toml: mirrors are the registries,
// host:port, that pulls from a host go to instead, in plain HTTP.
func StartCRIO(ctx context.Context, dir string, place *private.Place, c private.Config, mirrors map[string]string) (*Daemon, error) {
	conmon, err := exec.LookPath("conmon")
	if err != nil {
		return nil, fmt.Errorf("configure CRI-O: %w", err)
	}
	config := fmt.Sprintf(`[crio]
root = %[1]q
runroot = %[2]q
storage_driver = "overlay"
log_dir = %[3]q
version_file = %[4]q
clean_shutdown_file = %[5]q
[crio.api]
listen = %[6]q
stream_port = "0"
[crio.runtime]
default_runtime = "runc"
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
hooks_dir = []
namespaces_dir = %[7]q
container_exits_dir = %[8]q
container_attach_socket_dir = %[7]q
pinns_path = %[9]q
[crio.runtime.runtimes.runc]
runtime_path = %[10]q
runtime_type = "oci"
runtime_root = %[11]q
monitor_path = %[12]q
monitor_cgroup = "pod"
[crio.image]
signature_policy = %[13]q
signature_policy_dir = %[14]q
pause_image = "registry.k8s.io/pause:3.9"
[crio.network]
network_dir = %[15]q
plugin_dirs = [%[16]q]
[crio.nri]
enable_nri = false
`, place.Path("root"), place.Path("storage"), place.Path("log"), place.Path("run", "version"),
		place.Path("root", "clean.shutdown"), place.Socket(), place.Path("run"), place.Path("run", "exits"),
		filepath.Join(dir, "pinns"), filepath.Join(dir, "runc"), place.Path("run", "runc"), conmon,
		place.Path("policy.json"), place.Path("policies"), place.Path("cni"), c.Plugins)
	registries := ""
	for host, mirror := range mirrors {
		registries += fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = \"%s\"\ninsecure = true\n", host, mirror)
	}
	err = prepare(place, c)
	for name, text := range map[string]string{
		"crio.conf": config,
		// CRI-O has no setting for it, but takes the user's before the system's.
		".config/containers/registries.conf": registries,
		"policy.json":                        `{"default": [{"type": "insecureAcceptAnything"}]}`,
		// Without one CRI-O reads the system's.
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", place.Path("root"), place.Path("storage")),
	} {
		if err == nil {
			err = os.MkdirAll(filepath.Dir(place.Path(name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(place.Path(name), []byte(text), 0o644)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("configure CRI-O: %w", err)
	}
	cmd := exec.Command(filepath.Join(dir, "crio"), "--config", place.Path("crio.conf"), "--config-dir", "")
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"),
		"HOME="+place.Dir, "CONTAINERS_STORAGE_CONF="+place.Path("storage.conf"))
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	return start(ctx, place, cmd)
}
