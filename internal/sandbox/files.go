package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/spec"
)

// shmSize is /dev/shm's size in a pod, bytes: what Docker made the custom.
const shmSize = 64 << 20

// makeFiles makes the sandbox's folder with the files its containers share.
func (m *Manager) makeFiles(r *Record) error {
	dir := m.dir(r.ID)
	_, gids := spec.IDMappings(r.Config)
	for _, d := range []string{dir, m.shm(r.ID)} {
		if err := host.PrivateDir(d, gids); err != nil {
			return fmt.Errorf("make sandbox directory: %w", err)
		}
	}
	// kubelet makes its own; crictl's users expect one to be made. It stays: logs
	// outlive the pod.
	if logs := r.Config.GetLogDirectory(); logs != "" {
		if err := os.MkdirAll(logs, 0o755); err != nil {
			return fmt.Errorf("log_directory: %w", err)
		}
	}
	resolv, err := resolvConf(r.Config.GetDnsConfig())
	if err != nil {
		return err
	}
	hostname := r.Config.GetHostname()
	if hostname == "" {
		if hostname, err = os.Hostname(); err != nil {
			return fmt.Errorf("read the node's hostname: %w", err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), resolv, 0o644); err != nil {
		return fmt.Errorf("write resolv.conf: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hostname"), []byte(hostname+"\n"), 0o644); err != nil {
		return fmt.Errorf("write hostname: %w", err)
	}
	if namespaces(r.Config).GetIpc() == runtime.NamespaceMode_NODE {
		return nil
	}
	return mountShm(filepath.Join(m.shm(r.ID), "shm"), r)
}

// writeHosts makes the /etc/hosts of containers whose client brings none, as
// crictl does not: without it few images know what localhost is. A pod on the
// node's network has the node's.
func (m *Manager) writeHosts(r *Record, ips []netip.Addr) error {
	var b bytes.Buffer
	if r.HostNetwork() {
		raw, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read the node's hosts: %w", err)
		}
		b.Write(raw)
	} else {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
		if hostname := r.Config.GetHostname(); hostname != "" {
			for _, ip := range ips {
				fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(m.dir(r.ID), "hosts"), b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write hosts: %w", err)
	}
	return nil
}

func mountShm(path string, r *Record) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return fmt.Errorf("make shm directory: %w", err)
	}
	options := fmt.Sprintf("mode=1777,size=%d", shmSize)
	if uids, gids := spec.IDMappings(r.Config); len(uids) > 0 {
		options += fmt.Sprintf(",uid=%d,gid=%d", rootOf(uids), rootOf(gids))
	}
	if r.MountLabel != "" {
		options += fmt.Sprintf(",context=%q", r.MountLabel)
	}
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount the pod's /dev/shm at %s: %w", path, err)
	}
	return nil
}

// specPath is where the infra container's OCI description is.
func (m *Manager) specPath(id string) string { return filepath.Join(m.shm(id), "config.json") }

func (m *Manager) saveSpec(id string, oci *specs.Spec) error {
	raw, err := json.Marshal(oci)
	if err == nil {
		err = os.WriteFile(m.specPath(id), raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write spec of infra container: %w", err)
	}
	return nil
}

// Spec returns the OCI description of a sandbox's infra container. It goes when
// the sandbox is stopped, and with a reboot (errdefs.ErrNotFound).
func (m *Manager) Spec(id string) (*specs.Spec, error) {
	raw, err := os.ReadFile(m.specPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("spec of infra container of %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read spec of infra container: %w", err)
	}
	var oci specs.Spec
	if err := json.Unmarshal(raw, &oci); err != nil {
		return nil, fmt.Errorf("decode spec of infra container of %s: %w", id, err)
	}
	return &oci, nil
}

// rootOf is the host's ID of ID 0.
func rootOf(ids []specs.LinuxIDMapping) uint32 {
	for _, id := range ids {
		if id.ContainerID == 0 {
			return id.HostID
		}
	}
	return 0
}

// resolvConf is the pod's resolv.conf: the node's when CRI DNSConfig says nothing.
func resolvConf(dns *runtime.DNSConfig) ([]byte, error) {
	if raw := spec.ResolvConf(dns); raw != nil {
		return raw, nil
	}
	raw, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the node's resolv.conf: %w", err)
	}
	return raw, nil
}

// removeFiles unmounts and removes the sandbox's folders. The gone is success.
func (m *Manager) removeFiles(r *Record) error {
	if err := image.Unmount(filepath.Join(m.shm(r.ID), "shm")); err != nil {
		return err
	}
	for _, d := range []string{m.shm(r.ID), m.dir(r.ID)} {
		if err := os.RemoveAll(d); err != nil {
			return fmt.Errorf("remove sandbox directory: %w", err)
		}
	}
	return nil
}
