package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
)

// zip packs data at a level of compress/gzip.
func zip(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = w.Write(data)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// member is a gzip member around a deflate stream.
func member(deflated, plain []byte) []byte {
	m := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, deflated...)
	m = binary.LittleEndian.AppendUint32(m, crc32.ChecksumIEEE(plain))
	return binary.LittleEndian.AppendUint32(m, uint32(len(plain)))
}

func unzip(packed io.Reader) ([]byte, error) {
	z, err := NewReader(packed)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// texts are of all kinds of content: nothing, noise, runs, patterns of all short
// distances, a program, matches from as far as there are.
func texts(t testing.TB) map[string][]byte {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{1})
	noise := make([]byte, 300_000)
	_, _ = rnd.Read(noise)
	var patterns []byte
	for n := 1; n < 20; n++ {
		patterns = append(patterns, bytes.Repeat(noise[n*100:n*100+n], 1000)...)
	}
	far := bytes.Repeat(noise[:window], 20)
	var few []byte
	for i := range 500_000 {
		few = append(few, "acgt"[noise[i%len(noise)]&3])
	}
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"nothing": {}, "a byte": {'x'}, "noise": noise, "zeros": make([]byte, 1<<20),
		"patterns": patterns, "far": far, "few letters": few, "program": program[:min(len(program), 2<<20)],
	}
}

func TestInflatesWhatWasDeflated(t *testing.T) {
	for name, want := range texts(t) {
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9} {
			packed := zip(t, want, level)
			for how, r := range map[string]io.Reader{
				"whole":             bytes.NewReader(packed),
				"in halves":         iotest.HalfReader(bytes.NewReader(packed)),
				"end with the data": iotest.DataErrReader(bytes.NewReader(packed)),
			} {
				got, err := unzip(r)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s, level %d, %s: %d bytes of %d, equal %v, %v", name, level, how, len(got), len(want), bytes.Equal(got, want), err)
				}
			}
		}
	}
}

func TestReadsByteByByte(t *testing.T) {
	want := []byte(strings.Repeat("a layer of an image, ", 5000))
	z, err := NewReader(iotest.OneByteReader(bytes.NewReader(zip(t, want, 6))))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(iotest.OneByteReader(z))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

func TestMembersFollowEachOther(t *testing.T) {
	var packed, want []byte
	for _, text := range []string{"one", "", "three, as well as three", strings.Repeat("four", 100_000), "five"} {
		packed = append(packed, zip(t, []byte(text), 6)...)
		want = append(want, text...)
	}
	got, err := unzip(bytes.NewReader(packed))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
	}
	// A member must not reach into the one before it: a match of length 3, distance 1
	// as the first thing, in the fixed codes.
	back := member([]byte{0x03, 0x02, 0x00}, nil)
	if _, err := unzip(bytes.NewReader(append(zip(t, []byte("before"), 6), back...))); !errors.Is(err, ErrFormat) {
		t.Fatalf("a match before the member: %v", err)
	}
}

func TestHeadersWithEverything(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Name, w.Comment, w.Extra = "layer.tar", "a comment", bytes.Repeat([]byte("x"), 70)
	if _, err := w.Write([]byte("content")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := unzip(&b); err != nil || string(got) != "content" {
		t.Fatalf("%q, %v", got, err)
	}
	withSum := []byte{0x1f, 0x8b, 8, flagHeaderCRC, 0, 0, 0, 0, 0, 255}
	rest := member([]byte{0x03, 0x00}, nil)[10:]
	sum := binary.LittleEndian.AppendUint16(nil, uint16(crc32.ChecksumIEEE(withSum)))
	if got, err := unzip(bytes.NewReader(append(append(withSum, sum...), rest...))); err != nil || len(got) != 0 {
		t.Fatalf("%q, %v", got, err)
	}
	sum[0]++
	if _, err := unzip(bytes.NewReader(append(append(withSum[:10:10], sum...), rest...))); !errors.Is(err, ErrFormat) {
		t.Fatalf("wrong checksum of the header: %v", err)
	}
}

// TestCutAnywhere: what a stream lacks is noticed wherever it ends, and what was
// there is what was packed.
func TestCutAnywhere(t *testing.T) {
	for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6} {
		want := []byte(strings.Repeat("cut anywhere ", 40) + "0123456789 abcdefghijk")
		packed := zip(t, want, level)
		for n := range packed {
			z, err := NewReader(bytes.NewReader(packed[:n]))
			var got []byte
			if err == nil {
				got, err = io.ReadAll(z)
			}
			if n == 0 && errors.Is(err, io.EOF) {
				continue
			}
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("level %d, %d of %d bytes: %v", level, n, len(packed), err)
			}
			if len(got) > len(want)+8*pad {
				t.Fatalf("level %d, %d of %d bytes: inflated to %d", level, n, len(packed), len(got))
			}
		}
	}
}

func TestReadErrorIsPassedOn(t *testing.T) {
	broken := errors.New("connection reset")
	packed := zip(t, bytes.Repeat([]byte("abc"), 10000), 6)
	_, err := unzip(io.MultiReader(bytes.NewReader(packed[:len(packed)/2]), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
}

// TestGarbageEndsWithAnError flips bytes of streams: Go's own reader and this one
// refuse the same ones, and give the same of the others.
func TestGarbageEndsWithAnError(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	all := texts(t)
	for _, name := range []string{"patterns", "few letters", "program"} {
		text := all[name]
		packed := zip(t, text[:min(len(text), 100_000)], 6)
		for range 300 {
			spoiled := bytes.Clone(packed)
			for range 1 + rnd.IntN(3) {
				spoiled[rnd.IntN(len(spoiled))] ^= byte(1 << rnd.IntN(8))
			}
			compare(t, spoiled)
		}
	}
}

// compare has Go's own reader judge.
func compare(t *testing.T, packed []byte) {
	t.Helper()
	var want []byte
	ref, wantErr := gzip.NewReader(bytes.NewReader(packed))
	if wantErr == nil {
		want, wantErr = io.ReadAll(io.LimitReader(ref, 64<<20))
	}
	got, err := []byte(nil), error(nil)
	z, err := NewReader(bytes.NewReader(packed))
	if err == nil {
		got, err = io.ReadAll(io.LimitReader(z, 64<<20))
	}
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%x...: %v, Go's own reader says %v", packed[:min(len(packed), 40)], err, wantErr)
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("%x...: %d bytes, Go's own reader reads %d others", packed[:min(len(packed), 40)], len(got), len(want))
	}
}

func FuzzReader(f *testing.F) {
	for name, text := range texts(f) {
		if name != "program" {
			f.Add(zip(f, text[:min(len(text), 5000)], 6))
			f.Add(zip(f, text[:min(len(text), 5000)], flate.HuffmanOnly))
		}
	}
	f.Add(zip(f, []byte("stored"), flate.NoCompression))
	f.Add(member([]byte{0x03, 0x02, 0x00}, nil))
	f.Fuzz(func(t *testing.T, packed []byte) { compare(t, packed) })
}

func TestMemoryIsBounded(t *testing.T) {
	bomb := zip(t, make([]byte, 64<<20), 9)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	z, err := NewReader(bytes.NewReader(bomb))
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, z)
	if err != nil || n != 64<<20 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	runtime.ReadMemStats(&after)
	if taken := after.TotalAlloc - before.TotalAlloc; taken > 2<<20 {
		t.Errorf("a stream of %d bytes took %d bytes of memory", len(bomb), taken)
	}
}

func BenchmarkReader(b *testing.B) {
	text := texts(b)["program"]
	packed := zip(b, text, 6)
	for name, open := range map[string]func(io.Reader) (io.Reader, error){
		"inflate":       func(r io.Reader) (io.Reader, error) { return NewReader(r) },
		"compress/gzip": func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 64<<10)
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				r, err := open(bytes.NewReader(packed))
				if err == nil {
					_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
