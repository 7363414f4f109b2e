package server

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// settle is after which the files are looked at again: who empties a directory takes
// a while, and may come to what has been written anew.
const settle = time.Second

// rewatch is the pause before another try to watch the socket, which wants one of a few
// inotify instances (fs.inotify.max_user_instances).
const rewatch = time.Minute

// Guard serves the socket in dir, and sees to it that the socket and the files by which
// containers are taken over are there: when somebody empties the run directory, they
// are written anew. A podmon that holds nothing, and that no daemon talks to, ends
// instead. It ends with this podmon.
func (s *Server) Guard(l *net.UnixListener, dir string) error {
	served := make(chan error, 1)
	serve := func(l *net.UnixListener) { served <- s.Serve(l) }
	go serve(l)
	for {
		removed, stop, err := awaitRemoval(filepath.Join(dir, "sock"))
		var again <-chan time.Time
		if err != nil {
			logrus.WithError(err).Warn("watch the socket; trying again")
			again = time.After(rewatch)
		}
		select {
		case err := <-served:
			stop()
			return err
		case <-again:
			stop()
			continue
		case <-removed:
		}
		stop()
		if s.unneeded() {
			return nil
		}
		next, err := s.restore(dir)
		for ; err != nil; next, err = s.restore(dir) {
			logrus.WithError(err).Error("write the run directory anew")
			select {
			case err := <-served:
				return err
			case <-time.After(settle):
			}
		}
		logrus.Warn("somebody has emptied the run directory: the socket and the files of containers are written anew")
		time.AfterFunc(settle, s.keepFiles)
		l.Close()
		<-served
		go serve(next)
		l = next
	}
}

// unneeded tells that nothing would be lost with this podmon.
func (s *Server) unneeded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions) == 0 && !s.m.Busy()
}

// restore makes the socket and what podmon has on file again.
func (s *Server) restore(dir string) (*net.UnixListener, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s.keepFiles() // before a daemon can ask
	return s.Listen(dir)
}

// keepFiles writes what is missing of what podmon has on file.
func (s *Server) keepFiles() {
	if err := s.m.KeepFiles(); err != nil {
		logrus.WithError(err).Error("write the files of containers anew")
	}
}

// awaitRemoval closes removed when what path leads to now has been removed or moved. A
// bound socket has no other end: the kernel tells of a change of its link count, and that
// it was moved; not that a directory above it was. stop ends the waiting.
func awaitRemoval(path string) (removed <-chan struct{}, stop func(), err error) {
	gone := make(chan struct{})
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return gone, func() {}, fmt.Errorf("inotify: %w", err)
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	before, err := identity(path)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, path, unix.IN_ATTRIB|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOENT) {
		close(gone)
		return gone, func() { watch.Close() }, nil
	}
	if err != nil {
		return gone, func() { watch.Close() }, fmt.Errorf("watch %s: %w", path, err)
	}
	go func() {
		events := make([]byte, 16*unsafe.Sizeof(unix.InotifyEvent{}))
		for {
			// What went before the watch began is no event.
			if now, err := identity(path); err != nil || now != before {
				close(gone)
				return
			}
			if _, err := watch.Read(events); err != nil {
				return // closed
			}
		}
	}()
	return gone, func() { watch.Close() }, nil
}

// identity is a file's, whatever its name.
func identity(path string) (id [2]uint64, err error) {
	var st unix.Stat_t
	err = unix.Lstat(path, &st)
	if err == nil && st.Nlink == 0 { // told of before its name goes
		err = unix.ENOENT
	}
	return [2]uint64{st.Dev, st.Ino}, err
}
