package rootfs

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// CopyAttributes gives dst the owner, mode, times and extended attributes of src.
// Attributes in trusted.* are left out: they are overlayfs's own, and no image
// can bring any. So are those that dst's filesystem cannot hold.
func CopyAttributes(dst, src *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if err := unix.Fchown(int(dst.Fd()), int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	// After chown, which takes setuid bits and security.capability away.
	if err := copyXattrs(int(dst.Fd()), int(src.Fd())); err != nil {
		return err
	}
	if err := unix.Fchmod(int(dst.Fd()), st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	if err := unix.UtimesNanoAt(int(dst.Fd()), "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

const maxXattr = 64 << 10 // XATTR_LIST_MAX and XATTR_SIZE_MAX

func copyXattrs(dst, src int) error {
	// Most files have none or one short one.
	list, err := grow(func(b []byte) (int, error) { return unix.Flistxattr(src, b) })
	if err != nil {
		return skipUnsupported("list xattrs", err)
	}
	for name := range strings.SplitSeq(string(list), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.") {
			continue
		}
		value, err := grow(func(b []byte) (int, error) { return unix.Fgetxattr(src, name, b) })
		if err == nil {
			err = unix.Fsetxattr(dst, name, value, 0)
		}
		if err := skipUnsupported("copy xattr "+name, err); err != nil {
			return err
		}
	}
	return nil
}

// grow calls read with a small buffer, and with the largest there is if that is
// too small.
func grow(read func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 256)
	n, err := read(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, maxXattr)
		n, err = read(buf)
	}
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

func skipUnsupported(attempt string, err error) error {
	if err == nil || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return fmt.Errorf("%s: %w", attempt, err)
}
