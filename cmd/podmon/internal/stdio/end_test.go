package stdio

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What is in the pipe when waiting for its end is given up is read all the same.
func TestDrainReadsTheRest(t *testing.T) {
	b := newBench(t)
	o := b.output()
	o.Read()
	o.mu.Lock() // the reader is held up behind its first chunk, as by a slow disk
	b.write("one\n")
	for n := 1; n > 0; {
		var err error
		if n, err = unix.IoctlGetInt(int(b.r.Fd()), unix.TIOCINQ); err != nil {
			t.Fatal(err)
		}
	}
	b.write("two\n")
	o.interrupt()
	o.mu.Unlock()
	if err := o.Drain(time.Minute); err != nil {
		t.Fatal(err)
	}
	if got, want := b.logged(), "stdout F one\nstdout F two\n"; got != want {
		t.Errorf("log %q, want %q", got, want)
	}
}

// A reader that is too slow on one stream, or has closed it, loses both.
func TestCutOff(t *testing.T) {
	for name, tc := range map[string]struct {
		chunks  int
		readers bool
		want    error
	}{
		"slow": {2*attachLimit/chunk + 4, true, ErrSlow},
		"gone": {1, false, ErrGone},
	} {
		t.Run(name, func(t *testing.T) {
			o := New("c", t.TempDir(), nil, nil)
			outR, outW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer outR.Close()
			errR, errW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer errR.Close()
			a := o.Attach(outW, errW)
			if !tc.readers {
				outR.Close()
			}
			for range tc.chunks {
				o.tee("stdout", []byte(strings.Repeat("x", chunk)))
			}
			done := make(chan struct{})
			go func() { a.Wait(t.Context()); close(done) }()
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				t.Fatal("the attachment goes on")
			}
			if !errors.Is(a.Err(), tc.want) {
				t.Errorf("error %v, want %v", a.Err(), tc.want)
			}
			if n, err := errR.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Error("the other stream goes on")
			}
		})
	}
}
