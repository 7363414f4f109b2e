package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pipes counts this process's descriptors of pipes.
func pipes(t *testing.T) (count int) {
	t.Helper()
	open, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range open {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, "pipe:") {
			count++
		}
	}
	return count
}

// A look leaves in the pipe what it has seen, and the pipe it looks through empty.
func TestLookTakesNothing(t *testing.T) {
	b := newBench(t)
	s := b.journal.get("c", "stdout")
	b.write("abc")
	if !s.canPeek() {
		t.Fatal("no pipe to look through")
	}
	var seen [sentinelSize]byte
	for range 3 {
		if n, err := s.peek(int(b.r.Fd()), seen[:2]); n != 2 || err != nil || string(seen[:2]) != "ab" {
			t.Errorf("seen %q, %v", seen[:n], err)
		}
		for name, fd := range map[string]int{"output": int(b.r.Fd()), "look": s.look[0]} {
			want := map[string]int{"output": 3}[name]
			if n, err := unix.IoctlGetInt(fd, unix.TIOCINQ); n != want || err != nil {
				t.Errorf("%s holds %d bytes, %v", name, n, err)
			}
		}
	}
}

// Slots that are not used any more give back the pipes that they look through, and so
// do those of a journal that somebody has removed.
func TestLookIsGivenBack(t *testing.T) {
	b := newBench(t)
	before := pipes(t)
	look := func(count int) {
		var slots []*slot
		b.write("x")
		for range count {
			s := b.journal.get("c", "stdout")
			b.expect(s, 1)
			slots = append(slots, s)
		}
		if n := pipes(t) - before; n != 2*count {
			t.Errorf("%d descriptors of pipes for %d slots", n, count)
		}
		for _, s := range slots {
			b.journal.put(s)
		}
		if _, err := unix.Read(int(b.r.Fd()), make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	look(20)
	if n := pipes(t) - before; n != 2*keepSlots {
		t.Errorf("%d descriptors of pipes, and %d slots are kept", n, keepSlots)
	}
	underway := b.journal.get("c", "stdout")
	b.write("x")
	b.expect(underway, 1)
	path := filepath.Join(b.dir, "journal")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := b.journal.Keep(path); err != nil {
		t.Fatal(err)
	}
	b.journal.put(underway)
	if n := pipes(t) - before; n != 0 {
		t.Errorf("%d descriptors of pipes are of a journal that is gone", n)
	}
	// Without a pipe there is no look, and reading goes on.
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	s := b.journal.get("c", "stdout")
	full := unix.Rlimit{Cur: 1, Max: was.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &full); err != nil {
		t.Fatal(err)
	}
	err := s.expect(int(b.r.Fd()), 1)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err != nil || s.state() != slotReading || len(s.data()) != 1 || s.look != noPipe {
		t.Errorf("without descriptors: %v, state %d, %d bytes, %v", err, s.state(), len(s.data()), s.look)
	}
}

// A container can keep its pipe locked, by a write of memory that does not come
// (userfaultfd(2)). Who looks into it waits, and nobody else.
func TestLookIsHeldUpAlone(t *testing.T) {
	// The kernel locks two pipes in the order of their addresses: try several.
	for range 12 {
		lookBesideLocked(t)
	}
}

func lookBesideLocked(t *testing.T) {
	t.Helper()
	held, other := newBench(t), newBench(t)
	page, comes := absentPage(t)
	held.write("a")
	other.write("b")
	out, in := int(held.r.Fd()), held.w.Fd()
	written := make(chan error, 1)
	thread := onThread(func() {
		_, _, errno := unix.Syscall(unix.SYS_WRITE, in, page, 1)
		written <- errnoErr(errno)
	})
	awaitThread(t, thread, "wchan", "handle_userfault")
	s := held.journal.get("held", "stdout")
	looked := make(chan error, 1)
	thread = onThread(func() { looked <- s.expect(out, 1) })
	awaitThread(t, thread, "syscall", fmt.Sprint(unix.SYS_TEE, " "))

	s = held.journal.get("other", "stdout")
	done := make(chan error, 1)
	go func() { done <- s.expect(int(other.r.Fd()), 1) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a look into one container's output waits for another's")
	}
	if len(looked) > 0 {
		t.Error("the look into a locked pipe did not wait")
	}
	comes()
	if err := errors.Join(<-looked, <-written); err != nil {
		t.Error(err)
	}
}

func errnoErr(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// onThread runs f in a thread of its own, and returns its ID.
func onThread(f func()) int {
	id := make(chan int)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		id <- unix.Gettid()
		f()
	}()
	return <-id
}

// awaitThread waits until a file of a thread's in /proc begins with a text.
func awaitThread(t *testing.T, id int, file, text string) {
	t.Helper()
	var is []byte
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(time.Millisecond) {
		if is, _ = os.ReadFile(fmt.Sprintf("/proc/self/task/%d/%s", id, file)); bytes.HasPrefix(is, []byte(text)) {
			return
		}
	}
	t.Fatalf("%s of a thread is %q, not %q", file, is, text)
}

// absentPage is the address of memory whose first use waits until comes is called.
func absentPage(t *testing.T) (page uintptr, comes func()) {
	t.Helper()
	const (
		api, register = 0xc018aa3f, 0xc020aa00 // UFFDIO_API, UFFDIO_REGISTER
		version       = 0xaa                   // UFFD_API
		missing       = 1                      // UFFDIO_REGISTER_MODE_MISSING
	)
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		t.Skipf("SKIPPED: this kernel has no userfaultfd for us: %v", errno)
	}
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	page = uintptr(unsafe.Pointer(&mem[0]))
	agree := [3]uint64{version}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, api, uintptr(unsafe.Pointer(&agree))); errno != 0 {
		t.Fatal("UFFDIO_API: ", errno)
	}
	ask := [4]uint64{uint64(page), uint64(len(mem)), missing}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, register, uintptr(unsafe.Pointer(&ask))); errno != 0 {
		t.Fatal("UFFDIO_REGISTER: ", errno)
	}
	open := true
	comes = func() {
		if open {
			unix.Close(int(fd))
		}
		open = false
	}
	t.Cleanup(func() {
		comes()
		_ = unix.Munmap(mem)
	})
	return page, comes
}
