package rootfs

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func stat(t *testing.T, path ...string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Lstat(filepath.Join(path...), &st))
	return st
}

func TestCopyUpKeepsEverything(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: owners and device nodes")
	}
	root, dst := tree(t, map[string]string{"data/sub/file": "hello", "data/setuid": "x", "data/empty": ""}), t.TempDir()
	data := filepath.Join(root, "data")
	check(t, os.Chown(filepath.Join(data, "setuid"), 33, 44))
	check(t, os.Chmod(filepath.Join(data, "setuid"), 0o755|os.ModeSetuid))
	check(t, unix.Setxattr(filepath.Join(data, "setuid"), "user.note", []byte("kept"), 0))
	check(t, os.Link(filepath.Join(data, "sub/file"), filepath.Join(data, "linked")))
	check(t, os.Symlink("/etc/passwd", filepath.Join(data, "symlink")))
	check(t, unix.Mkfifo(filepath.Join(data, "fifo"), 0o620))
	check(t, unix.Mknod(filepath.Join(data, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	check(t, os.Chown(data, 1000, 1001))
	check(t, os.Chmod(data, 0o750|os.ModeSticky))
	old := time.Unix(1600000000, 0)
	check(t, os.Chtimes(filepath.Join(data, "sub"), old, old))
	check(t, os.Chtimes(data, old, old))

	check(t, CopyUp(root, "/data", dst))

	for _, name := range []string{".", "sub", "sub/file", "setuid", "empty", "symlink", "fifo", "null", "linked"} {
		a, b := stat(t, data, name), stat(t, dst, name)
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Mtim != b.Mtim || a.Rdev != b.Rdev || (a.Size != b.Size && name != "." && name != "sub") {
			t.Errorf("%s: %+v became %+v", name, a, b)
		}
	}
	if stat(t, dst, "linked").Ino != stat(t, dst, "sub/file").Ino {
		t.Error("hard link became a second file")
	}
	if to, err := os.Readlink(filepath.Join(dst, "symlink")); err != nil || to != "/etc/passwd" {
		t.Errorf("symlink: %q, %v", to, err)
	}
	if body, err := os.ReadFile(filepath.Join(dst, "sub/file")); err != nil || string(body) != "hello" {
		t.Errorf("file: %q, %v", body, err)
	}
	value := make([]byte, 16)
	if n, err := unix.Getxattr(filepath.Join(dst, "setuid"), "user.note", value); err != nil || string(value[:n]) != "kept" {
		t.Errorf("xattr: %q, %v", value[:max(n, 0)], err)
	}
}

func TestCopyUpStaysInTheRootfs(t *testing.T) {
	outside := tree(t, map[string]string{"secret": "s"})
	root, dst := tree(t, map[string]string{"inner/file": "f"}), t.TempDir()
	check(t, os.Symlink(outside, filepath.Join(root, "data")))
	check(t, CopyUp(root, "/data", dst)) // does not exist in the rootfs
	if names, _ := os.ReadDir(dst); len(names) != 0 {
		t.Errorf("copied from the host: %v", names)
	}
	check(t, os.Symlink("/inner", filepath.Join(root, "ok")))
	check(t, CopyUp(root, "/ok", dst))
	if _, err := os.Stat(filepath.Join(dst, "file")); err != nil {
		t.Error(err)
	}
}

func TestCopyUpRefuses(t *testing.T) {
	root := tree(t, map[string]string{"file": "x"})
	if err := CopyUp(root, "/file", t.TempDir()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a file: %v", err)
	}
	if err := CopyUp(root, "/nothing/there", t.TempDir()); err != nil {
		t.Errorf("nothing: %v", err)
	}
	deep := filepath.Join(root, "deep")
	for range maxDepth + 2 {
		deep = filepath.Join(deep, "d")
	}
	check(t, os.MkdirAll(deep, 0o755))
	if err := CopyUp(root, "/deep", t.TempDir()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too deep: %v", err)
	}
}
