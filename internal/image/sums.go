package image

import (
	"archive/tar"
	"hash/crc32"
	"io"
	"path"
	"strings"
)

// sums takes the checksums of an archive's files while they are unpacked, so that
// their listing need not read them again. It passes the archive on to who unpacks
// it, and is told of each header before the content is read.
//
// It knows what an archive wrote under which name, not what has become of it since:
// who asks compares the size, and it knows nothing any more once names may have led
// elsewhere.
type sums struct {
	r     io.Reader
	known map[string]content // by clean path without a slash before it
	// elsewhere are the names that are symbolic links, or may be. Once something is
	// written below one of them nothing is known.
	elsewhere map[string]bool
	checked   string // directory that no link is on the way to
	lost      bool

	name string // of the file whose content comes
	left int64
	content
}

type content struct {
	size int64
	sum  uint32
}

// maxSums bounds the memory that sums takes; what is unpacked after so many files
// is read again.
const maxSums = 100_000

func newSums(r io.Reader) *sums {
	return &sums{r: r, known: map[string]content{}, elsewhere: map[string]bool{}}
}

// see is told of the header of what comes next; name is clean.
func (s *sums) see(hdr *tar.Header, name string) {
	s.left = 0
	delete(s.known, name)
	if dir := path.Dir(name); dir != s.checked && len(s.elsewhere) > 0 && !s.lost {
		for d := dir; d != "."; d = path.Dir(d) {
			s.lost = s.lost || s.elsewhere[d]
		}
		s.checked = dir
	}
	switch hdr.Typeflag {
	case tar.TypeSymlink, tar.TypeLink:
		s.elsewhere[name] = true
		s.checked = ""
	case tar.TypeReg:
		if s.lost || len(s.known) >= maxSums || isSparse(hdr) {
			return
		}
		s.name, s.left, s.content = name, hdr.Size, content{size: hdr.Size}
		if s.left == 0 {
			s.known[name] = s.content
		}
	}
}

// isSparse: what is in the archive is not what is in the file.
func isSparse(hdr *tar.Header) bool {
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// Read implements io.Reader.
func (s *sums) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if s.left > 0 {
		some := min(int64(n), s.left)
		s.sum = crc32.Update(s.sum, castagnoli, p[:some])
		if s.left -= some; s.left == 0 {
			s.known[s.name] = s.content
		}
	}
	return n, err
}

// of returns the checksum of a file of that size.
func (s *sums) of(name string, size int64) (sum uint32, ok bool) {
	if s == nil || s.lost {
		return 0, false
	}
	c, ok := s.known[name]
	return c.sum, ok && c.size == size
}
