package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/config"
)

func files(_ context.Context, cfg *config.Config) []Finding {
	return []Finding{
		podmon(cfg),
		directory("root", cfg.Root, func(fs string) Finding {
			if fs == "tmpfs" {
				return warning("root", cfg.Root+" on tmpfs", "images take memory and are gone after a reboot", "set root to a directory on a disk")
			}
			return Finding{}
		}),
		directory("run", cfg.Run, func(fs string) Finding {
			if fs != "tmpfs" && fs != "ramfs" {
				return warning("run", cfg.Run+" on "+fs,
					"each start of a container waits for a disk, and what a reboot should clear may stay", "set run to a directory below /run, and have a tmpfs there")
			}
			return Finding{}
		}),
		directory("network namespaces", cfg.Network.NetnsDir, nil),
		directory("socket", filepath.Dir(cfg.CRI.Socket), nil),
	}
}

func podmon(cfg *config.Config) Finding {
	path, err := cfg.MonitorBinary()
	if err != nil {
		return failure("podmon", err.Error(), "containers are started and held by it", "install podmon beside podshim, or set monitor.binary")
	}
	return ok("podmon", "%s", path)
}

// directory says whether podshim can write to path, or make it, and leaves the
// kind of filesystem to judge; a zero Finding from judge is no objection.
func directory(name, path string, judge func(fs string) Finding) Finding {
	dir := nearest(path)
	if err := tryWrite(dir); err != nil {
		return failure(name, err.Error(), fmt.Sprintf("podshim keeps files in %s", path), "make it writable, or choose another directory")
	}
	fs, free, err := filesystem(dir)
	if err != nil {
		return failure(name, err.Error(), "", "")
	}
	if judge != nil {
		if f := judge(fs); f.Level != "" {
			return f
		}
	}
	state := ""
	if dir != path {
		state = ", to be made"
	}
	return ok(name, "%s on %s, %d MiB free%s", path, fs, free>>20, state)
}

// nearest is path or the closest directory above it that exists.
func nearest(path string) string {
	for {
		if fi, err := os.Stat(path); err == nil && fi.IsDir() || path == "/" || path == "." {
			return path
		}
		path = filepath.Dir(path)
	}
}

func tryWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".podshim-check-")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// filesystem tells the kind of filesystem path is on, by statfs(2)'s magic
// numbers, and how many bytes are free on it.
func filesystem(path string) (kind string, free uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return "", 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	kind, known := map[int64]string{
		unix.EXT4_SUPER_MAGIC:      "ext4",
		unix.XFS_SUPER_MAGIC:       "xfs",
		unix.BTRFS_SUPER_MAGIC:     "btrfs",
		unix.F2FS_SUPER_MAGIC:      "f2fs",
		unix.TMPFS_MAGIC:           "tmpfs",
		unix.RAMFS_MAGIC:           "ramfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
		unix.NFS_SUPER_MAGIC:       "nfs",
		0x2fc12fc1:                 "zfs",
	}[int64(st.Type)]
	if !known {
		kind = fmt.Sprintf("filesystem %#x", st.Type)
	}
	return kind, st.Bavail * uint64(st.Bsize), nil
}
