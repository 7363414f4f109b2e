// Package crilog writes container output as CRI logs, the files that kubelet
// reads for `kubectl logs`.
//
// The path comes from kubelet and the directories are its own, but what is in
// them may have been made by a pod with a host path mount. So the file is
// opened beneath the log root without following any symlink, and only a regular
// file is accepted.
package crilog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Log is one container's log file, written by the goroutines of its streams.
// Writing never fails for the caller: output that cannot be written is counted,
// and the log says how much is missing once it can be written again.
type Log struct {
	root, path string

	mu   sync.Mutex
	f    *os.File
	lost int   // bytes of records not written since the last good write
	why  error // the first reason for it
}

// Open opens the log at path beneath root for appending, and creates it and the
// directories between as needed.
func Open(root, path string) (*Log, error) {
	l := &Log{root: root, path: path}
	f, err := openBeneath(root, path)
	if err != nil {
		return nil, err
	}
	l.f = f
	return l, nil
}

// Reopen goes on in a new file at the same path after the old one was renamed.
// Records are written either to the old or to the new file; none is lost. On an
// error the old file stays in use.
func (l *Log) Reopen() error {
	f, err := openBeneath(l.root, l.path)
	if err != nil {
		return err
	}
	l.mu.Lock()
	old := l.f
	l.f = f
	l.mu.Unlock()
	return closeIfOpen(old)
}

// Progress is told what happens to records, so that a write that a killed podmon
// has left half done can be undone. It is called with the log locked: nothing else
// is written meanwhile.
type Progress interface {
	Writing(log unix.Stat_t) // as the file is now
	Written()
}

// Write appends whole records in one system call, all of them or none. progress
// may be nil.
func (l *Log) Write(records []byte, progress Progress) {
	if len(records) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	out := records
	if l.lost > 0 {
		out = append(l.confession(), records...)
	}
	if progress != nil {
		var st unix.Stat_t
		if err := unix.Fstat(int(l.f.Fd()), &st); err == nil {
			progress.Writing(st)
		}
		defer progress.Written()
	}
	if err := l.append(out); err != nil {
		l.lost, l.why = l.lost+len(records), err
		return
	}
	l.lost, l.why = 0, nil
}

// Undo takes back what a killed podmon has appended to this very file at offset.
// When the log has been renamed since, its reader sees a torn record there.
func (l *Log) Undo(device, inode uint64, offset int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(int(l.f.Fd()), &st); err != nil {
		return err
	}
	if st.Dev != device || st.Ino != inode || st.Size <= offset {
		return nil
	}
	return l.f.Truncate(offset)
}

// confession is the record that says how much was lost.
func (l *Log) confession() []byte {
	return fmt.Appendf(nil, "%s stderr F [podmon: %d bytes of log records were lost here: %v]\n",
		time.Now().UTC().Format(time.RFC3339Nano), l.lost, l.why)
}

// append takes back what a write has done in part: a reader would take a torn
// record for the beginning of the next one.
func (l *Log) append(records []byte) error {
	n, err := l.f.Write(records)
	if err == nil || n == 0 {
		return err
	}
	st, serr := l.f.Stat()
	if serr != nil {
		return errors.Join(err, serr)
	}
	return errors.Join(err, l.f.Truncate(st.Size()-int64(n)))
}

// Close ends the log; later writes are dropped.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.f
	l.f = nil
	return closeIfOpen(f)
}

func closeIfOpen(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}

// beneath forbids leaving the directory a lookup starts in, by whatever means.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

func openBeneath(root, path string) (*os.File, error) {
	clean := filepath.Clean(path)
	if filepath.IsAbs(path) || clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return nil, fmt.Errorf("log path %q is not beneath the log directory", path)
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log directory %s: %w", root, err)
	}
	defer func() { unix.Close(dir) }()
	parents, name := filepath.Split(clean)
	for part := range strings.SplitSeq(strings.Trim(parents, "/"), "/") {
		if part == "" {
			continue
		}
		next, err := enter(dir, part)
		if err != nil {
			return nil, fmt.Errorf("log directory %q of %q: %w", part, path, err)
		}
		unix.Close(dir)
		dir = next
	}
	f, err := openLog(dir, name)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", filepath.Join(root, clean), err)
	}
	return f, nil
}

// enter opens the directory of that name in dir, and makes it when it is missing.
func enter(dir int, name string) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath}
	fd, err := openat2(dir, name, how)
	if err != unix.ENOENT {
		return fd, err
	}
	if err := unix.Mkdirat(dir, name, 0o755); err != nil && err != unix.EEXIST {
		return -1, err
	}
	return openat2(dir, name, how)
}

// openLog opens a log that is there, or makes it. What is there is looked at before
// it is opened: opening a device that was planted does something.
func openLog(dir int, name string) (*os.File, error) {
	for range 8 { // it may come and go between the two attempts
		path, err := openat2(dir, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath})
		if err == nil {
			defer unix.Close(path)
			return reopen(path, name)
		}
		if err != unix.ENOENT {
			return nil, err
		}
		fd, err := openat2(dir, name, &unix.OpenHow{
			Flags: unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Mode:  0o640, Resolve: beneath,
		})
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if err != unix.EEXIST {
			return nil, err
		}
	}
	return nil, unix.EEXIST
}

// reopen opens the regular file of an O_PATH descriptor for appending.
func reopen(path int, name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file")
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", path), unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openat2 retries what openat2(2) says to retry: EAGAIN is a rename seen
// underway, EINTR a signal of Go's runtime.
func openat2(dir int, name string, how *unix.OpenHow) (int, error) {
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, name, how)
		if err == unix.EINTR || (err == unix.EAGAIN && tries < 32) {
			continue
		}
		return fd, err
	}
}
