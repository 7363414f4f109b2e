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

	"github.com/containerd/containerd/v2/core/snapshots"
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

// looker makes entries of what is below root.
type looker struct {
	root  string
	known *sums             // from unpacking; may be nil
	blind bool              // no file is read, its checksum is 0
	links map[uint64]uint32 // checksums of files with several names, by inode
}

func newLooker(root string, known *sums) *looker {
	return &looker{root: root, known: known, links: map[uint64]uint32{}}
}

// look makes the entry of what is at root/name.
func (l *looker) look(name string) (e listed, st syscall.Stat_t, err error) {
	path := filepath.Join(l.root, name)
	if err := syscall.Lstat(path, &st); err != nil {
		return e, st, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	e.kind = st.Mode & syscall.S_IFMT
	switch e.kind {
	case syscall.S_IFREG:
		if e.size = st.Size; !l.blind {
			e.sum, err = l.sum(name, &st)
		}
	case syscall.S_IFLNK:
		var target string
		target, err = os.Readlink(path)
		e.sum = crc32.Checksum([]byte(target), castagnoli)
	}
	return e, st, err
}

func (l *looker) sum(name string, st *syscall.Stat_t) (uint32, error) {
	if sum, ok := l.links[st.Ino]; ok {
		return sum, nil
	}
	sum, ok := l.known.of(name, st.Size)
	if !ok {
		var err error
		if sum, err = sumOf(filepath.Join(l.root, name)); err != nil {
			return 0, err
		}
	}
	if st.Nlink > 1 {
		l.links[st.Ino] = sum
	}
	return sum, nil
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

// writeListing lists what is in dir/fs, and returns what all of dir takes. Files whose
// checksums are known are not read.
func writeListing(dir string, known *sums) (usage snapshots.Usage, err error) {
	f, err := os.OpenFile(filepath.Join(dir, listingFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return usage, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := crc32.New(castagnoli)
	w := bufio.NewWriterSize(f, 64<<10)
	all := io.MultiWriter(w, h)
	l := newLooker(filepath.Join(dir, "fs"), known)
	counted := map[uint64]bool{} // inodes with several names
	err = filepath.WalkDir(l.root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(path, l.root), "/")
		e, st, err := l.look(name)
		if err != nil {
			return err
		}
		if !counted[st.Ino] {
			usage.Inodes++
			usage.Size += st.Blocks * blockSize
		}
		if st.Nlink > 1 && e.kind != syscall.S_IFDIR {
			counted[st.Ino] = true
		}
		if name != "" {
			name = "/" + name
		}
		_, err = io.WriteString(all, e.line(name))
		return err
	})
	if err != nil {
		return usage, err
	}
	if _, err := fmt.Fprintf(w, "%x\n", h.Sum32()); err != nil {
		return usage, err
	}
	if err := w.Flush(); err != nil {
		return usage, err
	}
	for _, path := range []string{dir, f.Name()} {
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return usage, err
		}
		usage.Inodes++
		usage.Size += st.Blocks * blockSize
	}
	return usage, nil
}

// blockSize is the unit of st_blocks.
const blockSize = 512

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
	l := newLooker(root, nil)
	l.blind = !contents
	for line := range strings.Lines(text[:last]) {
		var want listed
		var path string
		if _, err := fmt.Sscanf(line, "%x %d %x %q\n", &want.kind, &want.size, &want.sum, &path); err != nil {
			return fmt.Errorf("the list of the files in %s is damaged: %w: %w", root, err, errdefs.ErrDataLoss)
		}
		switch got, _, err := l.look(path); {
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
