package streaming

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// halfCloser is a connection that can end its sending alone: TCP and Unix ones.
type halfCloser interface{ CloseWrite() error }

// Forward joins a client's stream with a connection to a port in a pod, both
// ways, and returns when both are done or ctx has ended. The end of one
// direction is passed on as a half-close, so that a server which answers after
// its client's end of file can. The connection is closed on return; a reset by
// the pod is an error, so that the client gets a reset too.
//
// WebSocket has no half-close: there the end of the pod's side ends the client's.
func Forward(ctx context.Context, stream io.ReadWriteCloser, conn net.Conn) error {
	stop := context.AfterFunc(ctx, func() {
		conn.Close()
		stream.Close()
	})
	defer stop()
	defer conn.Close()

	var toPod, fromPod error
	var both sync.WaitGroup
	both.Go(func() { toPod = forwardToPod(stream, conn) })
	both.Go(func() { fromPod = forwardToClient(stream, conn) })
	both.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(toPod, fromPod)
}

// forwardToPod copies what the client sends. A pod that takes no more does not
// stop the reading: the client's other connections share the wire.
func forwardToPod(stream io.ReadWriteCloser, conn net.Conn) error {
	_, err := io.Copy(writeOnly{conn}, stream)
	if err == nil {
		if half, ok := conn.(halfCloser); ok {
			err = half.CloseWrite()
		}
		return ignoreGone(err)
	}
	_, _ = io.Copy(io.Discard, stream)
	return ignoreGone(err)
}

// forwardToClient copies what the pod sends, then ends the client's stream. A
// client that takes no more ends the connection to the pod.
func forwardToClient(stream io.ReadWriteCloser, conn net.Conn) error {
	_, err := io.Copy(stream, readOnly{conn})
	if errors.Is(err, syscall.ECONNRESET) {
		conn.Close()
		reset(stream)
		return err
	}
	if err != nil {
		conn.Close()
	}
	stream.Close()
	return nil // the client is gone, or the other direction has closed conn
}

// reset breaks a stream off, so that its reader is freed; what cannot be reset
// is closed, which frees the reader of a WebSocket channel.
func reset(stream io.Closer) {
	if r, ok := stream.(interface{ Reset() error }); ok {
		_ = r.Reset()
		return
	}
	stream.Close()
}

// readOnly hides the connection's WriteTo, which would look for a splice.
type readOnly struct{ io.Reader }

// ignoreGone drops the errors of a pod that has closed, which the other
// direction reports as an end or a reset.
func ignoreGone(err error) error {
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ENOTCONN) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
