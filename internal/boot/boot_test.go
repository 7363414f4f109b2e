package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWhatTheMarkTells(t *testing.T) {
	path := filepath.Join(t.TempDir(), "boot")
	mark := func(f func(Last, string) error) func() error {
		return func() error {
			last, err := Read(path)
			if err != nil {
				return err
			}
			return f(last, path)
		}
	}
	for _, tc := range []struct {
		what               string
		before             func() error
		restarted, crashed bool
	}{
		{"no mark", func() error { return nil }, false, false},
		{"killed daemon, same boot", mark(Last.MarkStarted), false, false},
		{"stopped daemon, same boot", mark(Last.MarkStopped), false, false},
		{"the machine in order", func() error { return os.WriteFile(path, []byte(`{"boot":"other","stopped":true}`), 0o600) }, true, false},
		{"a power cut", func() error { return os.WriteFile(path, []byte(`{"boot":"other"}`), 0o600) }, true, true},
		{"a damaged mark", func() error { return os.WriteFile(path, make([]byte, 40), 0o600) }, false, false},
	} {
		if err := tc.before(); err != nil {
			t.Fatal(err)
		}
		last, err := Read(path)
		if err != nil || last.Restarted() != tc.restarted || last.Crashed() != tc.crashed {
			t.Errorf("%s: %+v, %v", tc.what, last, err)
		}
	}
}
