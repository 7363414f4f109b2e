package image

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// listingFile lies beside a layer's root directory, fs, and lists what is in that:
// a line for each entry with its type and, of a file, its length and checksum
//
//	<mode's type bits, hex> <length> <crc32c, hex> <path, quoted>
//
// The last line is the checksum of all others. A checksum of symbolic links is that
// of their targets. It tells damage, not forgery: nobody but root can write here.
const listingFile = "files"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// listed is one line of a listing.
type listed struct {
	kind uint32 // S_IFMT
	size int64
	sum  uint32
}

func (e listed) line(path string) string {
	return fmt.Sprintf("%x %d %x %q\n", e.kind, e.size, e.sum, path)
}

// look makes the entry of what is at path. sums has what is known of files with
// several names; without it no file is read, and its checksum is 0.
func look(path string, sums map[uint64]uint32) (listed, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return listed{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return listed{}, errors.New("no stat")
	}
	e := listed{kind: st.Mode & syscall.S_IFMT}
	switch e.kind {
	case syscall.S_IFREG:
		e.size = st.Size
		if sums == nil {
			break
		}
		sum, known := sums[st.Ino]
		if !known {
			if sum, err = sumOf(path); err != nil {
				return listed{}, err
			}
			if st.Nlink > 1 {
				sums[st.Ino] = sum
			}
		}
		e.sum = sum
	case syscall.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return listed{}, err
		}
		e.sum = crc32.Checksum([]byte(target), castagnoli)
	}
	return e, nil
}

func sumOf(path string) (uint32, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	h := crc32.New(castagnoli)
	_, err = io.Copy(h, f)
	return h.Sum32(), err
}

// writeListing lists what is in dir/fs.
func writeListing(dir string) (err error) {
	f, err := os.OpenFile(filepath.Join(dir, listingFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := crc32.New(castagnoli)
	w := bufio.NewWriterSize(f, 64<<10)
	all := io.MultiWriter(w, h)
	root := filepath.Join(dir, "fs")
	sums := make(map[uint64]uint32)
	err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		e, err := look(path, sums)
		if err != nil {
			return err
		}
		_, err = io.WriteString(all, e.line(strings.TrimPrefix(path, root)))
		return err
	})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "%x\n", h.Sum32()); err != nil {
		return err
	}
	return w.Flush()
}

// checkListing compares what is in dir/fs with its listing. Damage is
// errdefs.ErrDataLoss, and tells of the first file that is not as it was; a layer
// without a listing, of an earlier version of podshim, is errdefs.ErrNotImplemented.
// Without contents no file is read: types, lengths and symbolic links must do. It may
// be called while the layer is in use.
func checkListing(dir string, contents bool) error {
	root := filepath.Join(dir, "fs")
	if _, err := os.Lstat(root); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is gone: %w", root, errdefs.ErrDataLoss)
	}
	raw, err := os.ReadFile(filepath.Join(dir, listingFile))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s has no list of its files: %w", dir, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return err
	}
	text := string(raw)
	last := strings.LastIndexByte(strings.TrimSuffix(text, "\n"), '\n') + 1
	if want, err := strconv.ParseUint(strings.TrimSuffix(text[last:], "\n"), 16, 32); err != nil || crc32.Checksum(raw[:last], castagnoli) != uint32(want) {
		return fmt.Errorf("the list of the files in %s is damaged: %w", root, errdefs.ErrDataLoss)
	}
	var sums map[uint64]uint32
	if contents {
		sums = make(map[uint64]uint32)
	}
	for line := range strings.Lines(text[:last]) {
		var want listed
		var path string
		if _, err := fmt.Sscanf(line, "%x %d %x %q\n", &want.kind, &want.size, &want.sum, &path); err != nil {
			return fmt.Errorf("the list of the files in %s is damaged: %w: %w", root, err, errdefs.ErrDataLoss)
		}
		switch got, err := look(root+path, sums); {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			return fmt.Errorf("%s is gone: %w", root+path, errdefs.ErrDataLoss)
		case errors.Is(err, syscall.EIO), errors.Is(err, syscall.EUCLEAN):
			return fmt.Errorf("%s cannot be read: %w: %w", root+path, err, errdefs.ErrDataLoss)
		case err != nil:
			return err
		case got.kind != want.kind:
			return fmt.Errorf("%s is of another type: %w", root+path, errdefs.ErrDataLoss)
		case got.size != want.size:
			return fmt.Errorf("%s has %d bytes of %d: %w", root+path, got.size, want.size, errdefs.ErrDataLoss)
		case got.sum != want.sum && (contents || got.kind != syscall.S_IFREG):
			return fmt.Errorf("%s has another content: %w", root+path, errdefs.ErrDataLoss)
		}
	}
	return nil
}
