package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A plugin does not end with the daemon that has started it: what it was about to
// take it takes all the same, from a DEL that would run beside it too. So the next
// daemon looks for such plugins before it runs any, by the pod in their environment
// (CNI_CONTAINERID, which plugins hand on to those that they delegate to), and a
// pod's next operation begins when they have ended. A container can have anything in
// its environment, but not the daemon's mount namespace: it is not even looked at.

// orphans are the plugins of earlier daemons, by pod.
type orphans map[string][]orphan

type orphan struct {
	pid    int
	ending *os.File // a pidfd, readable when the process has ended
}

// findOrphans looks for plugins that run for one of the pods.
func findOrphans(pods []string) (orphans, error) {
	found := make(orphans)
	if len(pods) == 0 {
		return found, nil
	}
	keys := make(map[string]string, len(pods))
	for _, id := range pods {
		keys["CNI_CONTAINERID="+id] = id
	}
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("look for plugins that run: %w", err)
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || podOf(pid, ours, keys) == "" {
			continue
		}
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			found.close()
			return nil, fmt.Errorf("look for plugins that run: pidfd of %d: %w", pid, err)
		}
		ending := os.NewFile(uintptr(fd), "pidfd")
		// Once more, now that the PID cannot become another process's.
		id := podOf(pid, ours, keys)
		if id == "" {
			ending.Close()
			continue
		}
		found[id] = append(found[id], orphan{pid, ending})
	}
	return found, nil
}

// maxEnviron bounds what is read of an environment, which a process can make as
// large as its memory (PR_SET_MM_MAP).
const maxEnviron = 2 << 20

// podOf is the pod that a process of this mount namespace runs for as a plugin; ""
// for other processes.
func podOf(pid int, mountNS string, keys map[string]string) string {
	if its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err != nil || its != mountNS {
		return "" // gone, or not on the node's files
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "" // gone
	}
	defer f.Close()
	environ, err := io.ReadAll(io.LimitReader(f, maxEnviron))
	if err != nil {
		return "" // gone, or the kernel's
	}
	for kv := range bytes.SplitSeq(environ, []byte{0}) {
		if id, ok := keys[string(kv)]; ok {
			return id
		}
	}
	return ""
}

func (o orphans) close() {
	for _, all := range o {
		for _, p := range all {
			p.ending.Close()
		}
	}
}

// awaitOrphans waits until no plugin of an earlier daemon runs for the pod; what
// takes longer than a plugin may is killed. The pod's lock is held.
func (n *Network) awaitOrphans(ctx context.Context, id string) error {
	n.mu.Lock()
	all := n.orphans[id]
	n.mu.Unlock()
	limit := time.Now().Add(n.cfg.PluginTimeout)
	for _, p := range all {
		if err := p.await(ctx, limit); err != nil {
			return fmt.Errorf("wait for a plugin that an earlier podshim has started (pid %d, pod %s): %w", p.pid, id, err)
		}
	}
	n.mu.Lock()
	delete(n.orphans, id)
	n.mu.Unlock()
	for _, p := range all {
		p.ending.Close()
	}
	return nil
}

// await returns when the process has ended. At the limit its process group is
// killed, as that of a plugin of this daemon's.
func (p orphan) await(ctx context.Context, limit time.Time) error {
	conn, err := p.ending.SyscallConn()
	if err != nil {
		return err
	}
	if err := p.ending.SetReadDeadline(limit); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.ending.SetReadDeadline(time.Now()) })
	defer stop()
	wait := func() error { return conn.Read(func(fd uintptr) bool { return ended(fd) }) }
	err = wait()
	if err == nil || ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	// 0 and -1 would not be one group: kill(2).
	if group, gerr := unix.Getpgid(p.pid); gerr == nil && group > 1 && !p.ended(conn.Control) {
		if kerr := unix.Kill(-group, unix.SIGKILL); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
			return kerr
		}
	}
	if err := p.ending.SetReadDeadline(time.Now().Add(pipeGrace)); err != nil {
		return err
	}
	return wait()
}

func (p orphan) ended(control func(func(uintptr)) error) (over bool) {
	err := control(func(fd uintptr) { over = ended(fd) })
	return err == nil && over
}

// ended tells whether a pidfd's process has.
func ended(fd uintptr) bool {
	events, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err == nil && events > 0
}
