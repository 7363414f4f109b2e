// Package infra holds the program of a pod's infra container, so that a pod
// needs no image for it and none can be garbage-collected.
//
// The program is pause/pause.c, some hundred bytes that sleep, exit on SIGTERM and
// SIGINT, and reap children. Its root filesystem holds nothing else and is shared,
// read-only, by all pods.
package infra

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

//go:generate ./pause/build.sh

// Path is where the program is in the infra container.
const Path = "/pause"

// Install puts the root filesystem into dir, which it makes (0700), and returns
// its path, dir/rootfs. An installed one is checked and left alone when it is
// right, so running containers are not disturbed; a new program replaces the
// file and not its content.
func Install(dir string) (string, error) {
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("install infra rootfs: %w", err)
	}
	if err := os.Mkdir(rootfs, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("install infra rootfs: %w", err)
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
