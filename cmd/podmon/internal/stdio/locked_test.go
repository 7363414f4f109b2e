package stdio

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A container whose write waits for the memory that it is from, as of a file on a
// disk that hangs, keeps its pipe locked. That holds up who looks into that pipe, and
// nobody else.
func TestLockedPipeHoldsUpItsOwnReader(t *testing.T) {
	stuck, other := newBench(t), newBench(t)
	other.journal = stuck.journal
	stuck.write("ab")
	release := lockPipe(t, int(stuck.w.Fd()))
	reader := make(chan int)
	done := make(chan error)
	s := stuck.journal.get("stuck", "stdout")
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		reader <- unix.Gettid()
		done <- s.expect(int(stuck.r.Fd()), 2)
	}()
	awaitState(t, <-reader, 'D')

	read := make(chan error, 1)
	go func() {
		other.write("cd")
		s := stuck.journal.get("other", "stdout")
		read <- s.expect(int(other.r.Fd()), 2)
	}()
	select {
	case err := <-read:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("another container's output waits for it")
	}
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// lockPipe has a write to the pipe wait for its memory, until release is called.
func lockPipe(t *testing.T, pipe int) (release func()) {
	t.Helper()
	faults, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		t.Skipf("userfaultfd: %v", errno)
	}
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	// ioctl_userfaultfd(2)
	const apiVersion, opAPI, opRegister, modeMissing = 0xaa, 0xc018aa3f, 0xc020aa00, 1
	api := [3]uint64{apiVersion}
	region := [4]uint64{uint64(uintptr(unsafe.Pointer(&mem[0]))), uint64(len(mem)), modeMissing}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, faults, opAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		t.Fatal(errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, faults, opRegister, uintptr(unsafe.Pointer(&region))); errno != 0 {
		t.Fatal(errno)
	}
	written := make(chan error)
	go func() {
		_, err := unix.Write(pipe, mem)
		written <- err
	}()
	poll := []unix.PollFd{{Fd: int32(faults), Events: unix.POLLIN}}
	for poll[0].Revents == 0 {
		if _, err := unix.Poll(poll, 10_000); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
	}
	return func() {
		unix.Close(int(faults)) // the kernel goes on with a page of zeros
		if err := <-written; err != nil {
			t.Error(err)
		}
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	}
}

// awaitState waits until a thread of this process is in a state (proc_pid_stat(5)).
func awaitState(t *testing.T, tid int, state byte) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); runtime.Gosched() {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
		if err != nil {
			t.Fatal(err)
		}
		if rest := stat[bytes.LastIndexByte(stat, ')')+1:]; len(rest) > 1 && rest[1] == state {
			return
		}
	}
	t.Fatalf("thread %d is not in state %c", tid, state)
}
