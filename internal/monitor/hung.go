package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// killFound makes sure that the podmon of a directory is dead, whether or not it
// can be talked to, and returns when it is. Who it is it has written there itself,
// before it listened.
func killFound(ctx context.Context, dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, wire.ProcessFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never listened
	}
	if err != nil {
		return err
	}
	l := &link{}
	if err := json.Unmarshal(b, &l.Process); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, wire.ProcessFile), err)
	}
	if l.pidfd, err = unix.PidfdOpen(l.Process.PID, 0); err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of podmon: %w", err)
	}
	defer unix.Close(l.pidfd)
	if !l.Process.Exists() {
		return nil // its PID is another's
	}
	return l.kill(ctx)
}
