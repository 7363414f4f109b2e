package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Only ext4 without a journal is given the flag, beside those that the directory has.
func TestSpread(t *testing.T) {
	needRoot(t)
	for features, want := range map[string]uint32{"has_journal": 0, "^has_journal": topDir} {
		t.Run(features, func(t *testing.T) {
			dir := ext4(t, features)
			const nodump = 0x40
			f, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			flags := func() uint32 {
				n, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags()|nodump)); err != nil {
				t.Fatal(err)
			}
			want |= flags()
			for range 2 {
				Spread(dir)
				if got := flags(); got != want || got&nodump == 0 {
					t.Errorf("flags %#x, want %#x", got, want)
				}
			}
		})
	}
}

// ext4 gives an empty directory of a new file system, unmounted after the test.
func ext4(t *testing.T, features string) string {
	t.Helper()
	root := t.TempDir()
	image, dir := filepath.Join(root, "image"), filepath.Join(root, "fs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("SKIPPED: mkfs.ext4 is not installed (e2fsprogs)")
	}
	if out, err := exec.Command(mkfs, "-q", "-O", features, image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: no loop device or no ext4 here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("unmount: %v: %s", err, out)
		}
	})
	return dir
}
