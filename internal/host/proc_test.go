package host

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"
)

// An entry of /proc/sys keeps its inode number for as long as it is cached.
func TestForgetProc(t *testing.T) {
	needRoot(t)
	if userns.RunningInUserNS() {
		t.Skip("SKIPPED: /proc cannot be reconfigured in a user namespace")
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with its mount namespace
		result <- forgetOwnProc()
	}()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// forgetOwnProc tries it with a /proc that nobody else looks at.
func forgetOwnProc() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID, "hidepid=1,gid=7"); err != nil {
		return err
	}
	look := func() (inode uint64, options string, err error) {
		var st unix.Stat_t
		if err := unix.Stat("/proc/sys/net/ipv4", &st); err != nil {
			return 0, "", err
		}
		mounts, err := os.ReadFile("/proc/thread-self/mounts")
		lines := strings.Split(strings.TrimSpace(string(mounts)), "\n")
		return st.Ino, lines[len(lines)-1], err
	}
	held, err := os.Open("/proc/sys/net/core")
	if err != nil {
		return err
	}
	defer held.Close()
	inode, options, err := look()
	if err != nil {
		return err
	}
	if err := ForgetProc(); err != nil {
		return err
	}
	now, its, err := look()
	if err != nil {
		return err
	}
	if now == inode {
		return fmt.Errorf("/proc/sys/net/ipv4 is inode %d still", inode)
	}
	if its != options || !strings.Contains(options, "gid=7") {
		return fmt.Errorf("mounted with %q, then %q", options, its)
	}
	if names, err := held.Readdirnames(-1); err != nil || len(names) == 0 {
		return fmt.Errorf("what was open has %d entries (%v)", len(names), err)
	}
	return nil
}
