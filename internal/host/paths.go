package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/spec"
)

// maxProfile bounds a seccomp profile; the largest in use are some 20 KiB.
const maxProfile = 1 << 20

// maxDevices bounds what one directory of devices may hold.
const maxDevices = 4096

// Sources looks up the host paths of a config's mounts: symbolic links are
// followed, as the CRI demands, and a path that does not exist is refused
// (errdefs.ErrInvalidArgument, naming the field). The mount table is read only
// when a mount asks for propagation.
func Sources(mounts []*runtime.Mount) (map[string]spec.Source, error) {
	sources := make(map[string]spec.Source)
	for i, m := range mounts {
		if m.GetImage() != nil {
			continue
		}
		field := fmt.Sprintf("mounts[%d].host_path", i)
		real, err := filepath.EvalSymlinks(m.GetHostPath())
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%s: %q does not exist: %w", field, m.GetHostPath(), errdefs.ErrInvalidArgument)
		case err != nil:
			return nil, fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrInvalidArgument)
		}
		source := spec.Source{Path: real}
		if m.GetPropagation() != runtime.MountPropagation_PROPAGATION_PRIVATE {
			if source.Shared, source.Slave, err = propagation(real); err != nil {
				return nil, fmt.Errorf("%s: %w", field, err)
			}
		} else if known, ok := sources[m.GetHostPath()]; ok {
			source = known // one host path may be mounted twice
		}
		sources[m.GetHostPath()] = source
	}
	return sources, nil
}

// propagation is that of the mount a path is on: the last one in the table
// whose mount point holds the path, since later mounts cover earlier ones.
func propagation(path string) (shared, slave bool, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil {
		return false, false, fmt.Errorf("read mounts: %w", err)
	}
	var on *mountinfo.Info
	for _, m := range mounts {
		if on == nil || len(m.Mountpoint) >= len(on.Mountpoint) {
			on = m
		}
	}
	if on == nil {
		return false, false, fmt.Errorf("%s is on no mount", path)
	}
	for o := range strings.FieldsSeq(on.Optional) {
		shared = shared || strings.HasPrefix(o, "shared:")
		slave = slave || strings.HasPrefix(o, "master:")
	}
	return shared, slave, nil
}

// Devices looks up the devices of a config. A host path that is a directory
// stands for all devices below it, at the same places below the container path.
// Errors are errdefs.ErrInvalidArgument and name the field.
func Devices(config *runtime.ContainerConfig) ([]spec.Device, error) {
	var devices []spec.Device
	for i, d := range config.GetDevices() {
		found, err := devicesAt(d.GetHostPath(), d.GetContainerPath())
		if err != nil {
			return nil, fmt.Errorf("devices[%d].host_path: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		for _, node := range found {
			devices = append(devices, spec.Device{LinuxDevice: node, Access: d.GetPermissions()})
		}
	}
	return devices, nil
}

func devicesAt(hostPath, containerPath string) ([]specs.LinuxDevice, error) {
	if containerPath == "" {
		containerPath = hostPath
	}
	real, err := filepath.EvalSymlinks(hostPath)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(real)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		node, err := deviceNode(real, filepath.Clean(containerPath))
		if err != nil {
			return nil, err
		}
		return []specs.LinuxDevice{node}, nil
	}
	nodes, err := devicesBelow(real, filepath.Clean(containerPath))
	if err == nil && len(nodes) == 0 {
		return nil, fmt.Errorf("%s holds no devices", hostPath)
	}
	return nodes, err
}

// notDevices are what /dev holds besides devices of the machine: other file
// systems, and the terminal of whoever started the daemon.
var notDevices = map[string]bool{
	"/dev/pts": true, "/dev/shm": true, "/dev/mqueue": true, "/dev/fd": true, "/dev/hugepages": true,
	"/dev/console": true, "/dev/ptmx": true, "/dev/.lxc": true, "/dev/.lxd-mounts": true, "/dev/.udev": true,
}

// hostDevices are all devices of the machine, for privileged containers.
func hostDevices(dir string) ([]specs.LinuxDevice, error) { return devicesBelow(dir, dir) }

// devicesBelow walks a directory without following links. What vanishes
// meanwhile was never there: devices come and go.
func devicesBelow(dir, containerDir string) ([]specs.LinuxDevice, error) {
	var nodes []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if notDevices[path] {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if entry.Type()&fs.ModeDevice == 0 {
			return nil
		}
		node, err := deviceNode(path, filepath.Join(containerDir, strings.TrimPrefix(path, dir)))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if nodes = append(nodes, node); len(nodes) > maxDevices {
			return fmt.Errorf("%s holds more than %d devices", dir, maxDevices)
		}
		return nil
	})
	return nodes, err
}

// deviceNode describes the device at a host path as a node at containerPath.
func deviceNode(path, containerPath string) (specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return specs.LinuxDevice{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		kind = "b"
	case unix.S_IFCHR:
		kind = "c"
	default:
		return specs.LinuxDevice{}, fmt.Errorf("%s is not a device", path)
	}
	mode := fs.FileMode(st.Mode &^ unix.S_IFMT)
	return specs.LinuxDevice{
		Path: containerPath, Type: kind,
		Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
	}, nil
}

// ReadSeccomp reads a Localhost seccomp profile: a regular file of at most a
// MiB. It is what spec.Container.ReadSeccomp wants.
func ReadSeccomp(path string) ([]byte, error) {
	// O_NONBLOCK: a FIFO of that name must not hold the daemon up.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxProfile {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes: %w", path, maxProfile, errdefs.ErrInvalidArgument)
	}
	return io.ReadAll(io.LimitReader(f, maxProfile))
}
