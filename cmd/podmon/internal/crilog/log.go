// Package crilog writes container output as CRI logs, the files that kubelet
// reads for `kubectl logs`.
//
// The path comes from kubelet and the directories are its own, but what is in
// them may have been made by a pod with a host path mount. So the file is
// opened beneath the log root without following any symlink, and only a regular
// file is accepted.
package crilog

import (
	"bytes"
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

	mu     sync.Mutex
	f      *os.File // nil: it could not be opened
	closed bool
	tried  time.Time // when it was last attempted to open it
	lost   int       // bytes of records not written since the last good write
	why    error     // the last reason for it
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

// Await is a log that cannot be opened now. What is written counts as lost until it can.
func Await(root, path string, why error) *Log {
	return &Log{root: root, path: path, tried: time.Now(), why: why}
}

// openPause is between attempts to open a log.
const openPause = time.Second

// retryOpen opens a log that could not be opened; mu is held.
func (l *Log) retryOpen() {
	if l.f != nil || time.Since(l.tried) < openPause {
		return
	}
	l.tried = time.Now()
	if f, err := openBeneath(l.root, l.path); err != nil {
		l.why = err
	} else {
		l.f = f
	}
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
	defer l.mu.Unlock()
	if l.closed {
		return f.Close()
	}
	old := l.f
	l.f = f
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
	if l.closed {
		return
	}
	if l.retryOpen(); l.f == nil {
		l.lost += len(records)
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

// Undo takes back what a killed podmon has appended to this file, or to the one that it
// was before a rotation, at offset.
func (l *Log) Undo(device, inode uint64, offset int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.f
	if !isFile(f, device, inode) {
		var err error
		if f, err = l.rotated(device, inode); f == nil {
			return err
		}
		defer f.Close()
	}
	st, err := f.Stat()
	if err != nil || st.Size() <= offset {
		return err
	}
	return f.Truncate(offset)
}

func isFile(f *os.File, device, inode uint64) bool {
	var st unix.Stat_t
	return f != nil && unix.Fstat(int(f.Fd()), &st) == nil && st.Dev == device && st.Ino == inode
}

// rotated finds the file under another name in the log's directory, where kubelet
// puts it (PATH.TIME); nil when it is not there any more.
func (l *Log) rotated(device, inode uint64) (*os.File, error) {
	dir, name, err := enterParents(l.root, l.path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := openat2(dir, ".", &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: beneath})
	if err != nil {
		return nil, fmt.Errorf("open log directory: %w", err)
	}
	list := os.NewFile(uintptr(fd), "log directory")
	defer list.Close()
	names, err := list.Readdirnames(-1)
	for _, other := range names {
		var st unix.Stat_t
		if !strings.HasPrefix(other, name+".") || unix.Fstatat(dir, other, &st, unix.AT_SYMLINK_NOFOLLOW) != nil ||
			st.Dev != device || st.Ino != inode {
			continue
		}
		if f, err := openLog(dir, other); err != nil || isFile(f, device, inode) {
			return f, err
		} else {
			f.Close()
		}
	}
	return nil, err
}

// Mend takes back a record that a killed podmon has written in part at the end of
// this file: what comes next would be taken for the rest of it.
func (l *Log) Mend() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	st, err := l.f.Stat()
	if err != nil || st.Size() == 0 {
		return err
	}
	// It is open for writing only.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", l.f.Fd()))
	if err != nil {
		return err
	}
	defer f.Close()
	tail := make([]byte, min(st.Size(), maxRecord))
	if _, err := f.ReadAt(tail, st.Size()-int64(len(tail))); err != nil {
		return err
	}
	torn := len(tail) - 1 - bytes.LastIndexByte(tail, '\n')
	if torn == 0 || torn == len(tail) && int64(torn) < st.Size() {
		return nil // whole, or not a log of ours
	}
	return l.f.Truncate(st.Size() - int64(torn))
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

// Close ends the log; later writes are dropped. What is lost by then is said at
// the log's end, or in the error.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if l.lost > 0 && (l.f == nil || l.append(l.confession()) != nil) {
		err = fmt.Errorf("%d bytes of log records were lost: %w", l.lost, l.why)
	}
	f := l.f
	l.f, l.closed, l.lost = nil, true, 0
	return errors.Join(err, closeIfOpen(f))
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
	dir, name, err := enterParents(root, path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	f, err := openLog(dir, name)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", filepath.Join(root, path), err)
	}
	return f, nil
}

// enterParents opens the directory that path's last element is in, and makes those
// that are missing.
func enterParents(root, path string) (dir int, name string, err error) {
	clean := filepath.Clean(path)
	if filepath.IsAbs(path) || clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return -1, "", fmt.Errorf("log path %q is not beneath the log directory", path)
	}
	dir, err = unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", fmt.Errorf("open log directory %s: %w", root, err)
	}
	parents, name := filepath.Split(clean)
	for part := range strings.SplitSeq(strings.Trim(parents, "/"), "/") {
		if part == "" {
			continue
		}
		next, err := enter(dir, part)
		unix.Close(dir)
		if err != nil {
			return -1, "", fmt.Errorf("log directory %q of %q: %w", part, path, err)
		}
		dir = next
	}
	return dir, name, nil
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
