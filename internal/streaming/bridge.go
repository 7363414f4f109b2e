package streaming

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bridge copies between a client's Streams and the descriptors of a process.
// It is used by one goroutine:
//
//	b := NewBridge(streams)
//	defer b.Close()
//	in, out, errs, err := b.Pipes()       // or, with a terminal: b.Terminal(master)
//	... start the process with in, out and errs ...
//	b.Started()
//	... wait for the process, or for ctx ...
//	b.Drain(limit)
//
// and for attach, where the process runs already and its input is a descriptor
// that somebody else holds too:
//
//	out, errs, err := b.Outputs()
//	b.Input(stdin, func() { ...the client has closed its input... })
//	b.Resize(console)
//	... have out and errs fed ...
//	b.Started()
//	select { case <-b.Drained(): case <-ctx.Done(): }
//
// All descriptors it is given must be non-blocking, or Close waits for them.
type Bridge struct {
	streams Streams
	ours    []*os.File // read and written by the copiers, closed by Close
	outs    []*os.File // those of them that are read
	theirs  []*os.File // for the process, closed by Started
	stop    chan struct{}
	once    sync.Once
	inputs  sync.WaitGroup
	outputs sync.WaitGroup
	drained func() <-chan struct{}
}

// NewBridge takes the client's side.
func NewBridge(s Streams) *Bridge {
	b := &Bridge{streams: s, stop: make(chan struct{})}
	b.drained = sync.OnceValue(func() <-chan struct{} {
		done := make(chan struct{})
		go func() {
			b.outputs.Wait()
			close(done)
		}()
		return done
	})
	return b
}

// Pipes makes a pipe for each stream the client has asked for, starts copying,
// and returns the process's ends, blocking as programs expect them; nil is
// /dev/null. They belong to the Bridge.
func (b *Bridge) Pipes() (stdin, stdout, stderr *os.File, err error) {
	if b.streams.Stdin != nil {
		theirs, ours, err := b.pipe(0)
		if err != nil {
			return nil, nil, nil, err
		}
		stdin = theirs
		b.copyInput(ours, func() { ours.Close() })
	}
	stdout, stderr, err = b.Outputs()
	return stdin, stdout, stderr, err
}

// Outputs is Pipes without the input.
func (b *Bridge) Outputs() (stdout, stderr *os.File, err error) {
	for _, o := range []struct {
		to  io.Writer
		end **os.File
	}{{b.streams.Stdout, &stdout}, {b.streams.Stderr, &stderr}} {
		if o.to == nil {
			continue
		}
		theirs, ours, err := b.pipe(1)
		if err != nil {
			return nil, nil, err
		}
		*o.end = theirs
		b.copyOutput(o.to, ours)
	}
	return stdout, stderr, nil
}

// Terminal joins the client with the master of the process's terminal: output,
// input and sizes. The Bridge owns master from now on.
func (b *Bridge) Terminal(master *os.File) {
	b.ours = append(b.ours, master)
	if b.streams.Stdout != nil {
		b.copyOutput(b.streams.Stdout, master)
	}
	if b.streams.Stdin != nil {
		// No half-close: a terminal has no end of input but its user's ^D.
		b.copyInput(master, func() {})
	}
	b.resize(master)
}

// Input copies the client's input to a descriptor, which the Bridge owns from
// now on; ended is called when the client has closed its input (not when the
// Bridge is closed).
func (b *Bridge) Input(to *os.File, ended func()) {
	b.ours = append(b.ours, to)
	if b.streams.Stdin != nil {
		b.copyInput(to, ended)
	}
}

// Resize gives a terminal the sizes that the client sends. The Bridge owns the
// master from now on.
func (b *Bridge) Resize(master *os.File) {
	b.ours = append(b.ours, master)
	b.resize(master)
}

// Started closes the process's ends: it has its own now. Without that an
// output never ends.
func (b *Bridge) Started() {
	for _, f := range b.theirs {
		f.Close()
	}
	b.theirs = nil
}

// Drained is closed when every output has ended and the client has it all.
func (b *Bridge) Drained() <-chan struct{} { return b.drained() }

// Drain is called after a process's end and waits until the client has all that
// it wrote, however slow the client is. What the process has left running may
// hold the outputs open for ever: of its output the client gets what comes
// within limit.
func (b *Bridge) Drain(limit time.Duration) {
	b.Started()
	for _, f := range b.outs {
		// The error is that of a file that is closed.
		_ = f.SetReadDeadline(time.Now().Add(limit))
	}
	<-b.Drained()
}

// hangUpLimit is how long a client may take to accept output that is on its
// way to it when the Bridge is closed.
const hangUpLimit = 5 * time.Second

// Close ends all copying and returns when no goroutine and no descriptor is
// left. Closing twice is fine.
func (b *Bridge) Close() {
	b.once.Do(func() {
		b.Started()
		close(b.stop)
		if b.streams.Stdin != nil {
			b.streams.Stdin.Close()
		}
		for _, f := range b.ours {
			f.Close()
		}
		if b.streams.hangUp != nil {
			// A copier may be writing to a client that does not read.
			timer := time.AfterFunc(hangUpLimit, b.streams.hangUp)
			defer timer.Stop()
		}
		<-b.Drained()
		b.inputs.Wait()
	})
}

// pipe makes a pipe whose end for the process (0 reads, 1 writes) is blocking;
// the other one is ours and is not, so that Close frees whoever waits on it.
// The flag belongs to each end alone.
func (b *Bridge) pipe(process int) (theirs, ours *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	if err := unix.SetNonblock(fds[1-process], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	theirs, ours = os.NewFile(uintptr(fds[process]), "process"), os.NewFile(uintptr(fds[1-process]), "client")
	b.theirs, b.ours = append(b.theirs, theirs), append(b.ours, ours)
	return theirs, ours, nil
}

// copyOutput copies until the process closes its end (EIO on a terminal). When
// the client is gone our end is closed: the process hears of it by SIGPIPE, on
// a terminal by SIGHUP.
func (b *Bridge) copyOutput(to io.Writer, from *os.File) {
	b.outs = append(b.outs, from)
	b.outputs.Go(func() {
		buf := make([]byte, stdinChunk)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				if _, werr := to.Write(buf[:n]); werr != nil {
					from.Close()
					return
				}
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				copyRest(to, from, buf)
			}
			if err != nil {
				return
			}
		}
	})
}

// restLimit is the most that copyRest takes: the largest pipe that a process
// can make of the one it was given (/proc/sys/fs/pipe-max-size).
const restLimit = 1 << 20

// copyRest passes on what is in a pipe or terminal already, without waiting for
// more.
func copyRest(to io.Writer, from *os.File, buf []byte) {
	raw, err := from.SyscallConn()
	if err != nil {
		return
	}
	for left := restLimit; left > 0; {
		n := 0
		// Control does not care for the deadline, as Read would.
		if raw.Control(func(fd uintptr) { n, err = unix.Read(int(fd), buf) }) != nil {
			return // closed
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
		left -= n
	}
}

// copyInput copies until the client closes its input, and then calls ended.
// When the process takes no more, the rest is discarded: the client's other
// streams come over the same connection.
func (b *Bridge) copyInput(to *os.File, ended func()) {
	b.inputs.Go(func() {
		if _, err := io.Copy(writeOnly{to}, b.streams.Stdin); err != nil {
			select {
			case <-b.stop:
				return
			default:
			}
			if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.EIO) && !errors.Is(err, fs.ErrClosed) {
				return // the client's side broke
			}
			if _, err := io.Copy(io.Discard, b.streams.Stdin); err != nil {
				return
			}
		}
		ended()
	})
}

// writeOnly hides the file's ReadFrom, which would try to splice.
type writeOnly struct{ io.Writer }

// resize sets each size the client sends until there are no more.
func (b *Bridge) resize(master *os.File) {
	if b.streams.Resize == nil {
		return
	}
	b.inputs.Go(func() {
		for {
			select {
			case size, ok := <-b.streams.Resize:
				if !ok {
					return
				}
				// The terminal may be gone; then so is the need for its size.
				_ = SetSize(master, size)
			case <-b.stop:
				return
			}
		}
	})
}

// SetSize tells a terminal, by its master, how large it is; its foreground
// processes get SIGWINCH.
func SetSize(master *os.File, size TerminalSize) error {
	raw, err := master.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}
