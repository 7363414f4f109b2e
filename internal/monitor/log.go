package monitor

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// maxLog is the size at which podmon's log begins anew: it is in memory.
	maxLog = 1 << 20
	// maxWords is enough for the goroutine that a panic is about.
	maxWords = 4 << 10
)

func logOf(dir string) string { return filepath.Join(dir, "log") }

// lastWords is the end of the log in a podmon's directory.
func lastWords(dir string) (string, error) {
	f, err := os.Open(logOf(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-maxWords), maxWords))
	return string(b), err
}

// trimLog empties a log that has become too large; podmon appends to it.
func trimLog(dir string) error {
	st, err := os.Stat(logOf(dir))
	if err != nil || st.Size() <= maxLog {
		return err
	}
	return os.Truncate(logOf(dir), 0)
}
