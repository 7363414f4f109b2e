package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Files of a container's directory, RunDir/containers/ID. They are what the next
// podmon goes on from.
const (
	recordFile = "record.json"
	reapedFile = "reaped.json" // the exit, once PID 1 is reaped
	exitFile   = "exit.json"   // the same, once nothing is left of the container
)

// record is what a podmon knows of a container besides libcontainer's state.
// It is written before anything is started, and again when PID 1 runs.
type record struct {
	Owner       string            `json:"owner"` // the podmon, whose journal it is in
	LogRoot     string            `json:"log_root,omitempty"`
	LogPath     string            `json:"log_path,omitempty"`
	Terminal    bool              `json:"terminal,omitempty"`
	Discard     bool              `json:"discard,omitempty"`
	CgroupPaths map[string]string `json:"cgroup_paths,omitempty"`
	Systemd     bool              `json:"systemd,omitempty"`
	// Init is the program that PID 1 runs before the container's own.
	Init fileID `json:"init"`
	// Process is zero until the container has been started.
	Process wire.Process `json:"process"`
}

// fileID identifies a file that is in use.
type fileID struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

func identifyFile(path string) (fileID, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return fileID{st.Dev, st.Ino}, err
}

func save(dir, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	tmp := filepath.Join(dir, "."+name)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, name))
}

// load reads a file that save wrote; ok is false when there is none.
func load(dir, name string, v any) (ok bool, err error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
	}
	return true, nil
}
