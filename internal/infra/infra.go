// Package infra holds the program of a pod's infra container, so that a pod
// needs no image for it and none can be garbage-collected.
//
// The program is pause/pause.c, some hundred bytes that sleep, exit on SIGTERM and
// SIGINT, and reap children. Its root filesystem is shared, read-only, by all pods
// and holds nothing else but two empty directories, proc and dev, where Mounts go.
package infra

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

//go:generate ./pause/build.sh

// Path is where the program is in the infra container.
const Path = "/pause"

// mountPoints are made once here, because libcontainer makes missing ones in the
// shared root at every start.
var mountPoints = []string{"proc", "dev"}

// Mounts are what an infra container with this root needs to be started, and no
// more. libcontainer reads /proc on the way (cap_last_cap). It fills /dev with
// device nodes unless something is bind mounted there, and here that is the empty
// directory itself: pause opens nothing, and the root must stay as it is.
func Mounts(rootfs string) []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "bind", Source: filepath.Join(rootfs, "dev"),
			Options: []string{"bind", "ro", "nosuid", "noexec"}},
	}
}

// Install puts the root filesystem into dir and returns its path, dir/rootfs. It
// makes dir (0711: the root of a user namespace must get through). An installed one is checked and left alone when it is
// right, so running containers are not disturbed; a new program replaces the
// file and not its content.
func Install(dir string) (string, error) {
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", fmt.Errorf("install infra rootfs: %w", err)
	}
	for _, d := range append([]string{"."}, mountPoints...) {
		if err := os.Mkdir(filepath.Join(rootfs, d), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", fmt.Errorf("install infra rootfs: %w", err)
		}
	}
	program := filepath.Join(rootfs, Path)
	if installed(program) {
		return rootfs, nil
	}
	tmp, err := os.CreateTemp(dir, ".pause-")
	if err != nil {
		return "", fmt.Errorf("install pause: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, werr := tmp.Write(pause)
	if err := errors.Join(werr, tmp.Chmod(0o555), tmp.Close()); err != nil {
		return "", fmt.Errorf("install pause: %w", err)
	}
	if err := os.Rename(tmp.Name(), program); err != nil {
		return "", fmt.Errorf("install pause: %w", err)
	}
	return rootfs, nil
}

func installed(program string) bool {
	st, err := os.Lstat(program)
	if err != nil || st.Mode() != 0o555 {
		return false
	}
	b, err := os.ReadFile(program)
	return err == nil && bytes.Equal(b, pause)
}
