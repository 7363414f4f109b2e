package streaming

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// maxHalves is how many forwarded connections of one client may wait for the
// second of their streams.
const maxHalves = 1000

// forwards are the connections that one client forwards over SPDY. Each is a
// pair of streams, data and error, that name the same request and port.
//
// cri-streaming can do this too, but uses a stream before the library has sent
// the reply to it: when a port refuses at once the stream is reset first, and
// the goroutine then waits for the reply for ever.
type forwards struct {
	j       *job
	sandbox string
	work    sync.WaitGroup

	mu     sync.Mutex
	conn   httpstream.Connection // nil until it is made
	closed bool
	halves map[string]*pair // by request; those that are not complete
}

// pair are the streams of one forwarded connection.
type pair struct {
	port       uint16
	data, errs httpstream.Stream
	replies    []<-chan struct{} // closed when the client has been told of each stream
	expiry     *time.Timer
}

// serveForwards serves port-forward over SPDY until the client leaves.
func (j *job) serveForwards(w http.ResponseWriter, r *http.Request, sandbox string) {
	if _, err := httpstream.Handshake(r, w, portforward.SupportedProtocols); err != nil {
		return // the client has been told
	}
	f := &forwards{j: j, sandbox: sandbox, halves: make(map[string]*pair)}
	f.mu.Lock() // streams wait for the connection
	f.conn = spdy.NewResponseUpgrader().UpgradeResponse(w, r, f.accept)
	conn := f.conn
	f.mu.Unlock()
	if conn == nil {
		return // the client has been told
	}
	conn.SetIdleTimeout(j.server.config.IdleTimeout)
	<-conn.CloseChan()
	f.close()
	conn.Close()
	j.conn.Close() // ends the context of those that still run
	f.work.Wait()
}

// close takes no more streams.
func (f *forwards) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for _, p := range f.halves {
		p.expiry.Stop()
	}
	clear(f.halves)
}

// accept takes a client's new stream; an error refuses it.
func (f *forwards) accept(s httpstream.Stream, replied <-chan struct{}) error {
	h := s.Headers()
	port, err := strconv.ParseUint(h.Get(portforward.PortHeader), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("header %s: %q is not a port", portforward.PortHeader, h.Get(portforward.PortHeader))
	}
	request := h.Get(portforward.PortForwardRequestIDHeader)
	if request == "" {
		return fmt.Errorf("header %s: is missing", portforward.PortForwardRequestIDHeader)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.conn == nil {
		return errors.New("the connection is closed")
	}
	p, err := f.half(request, uint16(port))
	if err != nil {
		return err
	}
	if err := p.add(s, replied); err != nil {
		return err
	}
	if p.data != nil && p.errs != nil && p.expiry.Stop() {
		delete(f.halves, request)
		f.work.Go(func() { f.run(p) })
	}
	return nil
}

// half returns the pair of a request, which a lone stream does not keep for
// longer than the creation timeout.
func (f *forwards) half(request string, port uint16) (*pair, error) {
	if p := f.halves[request]; p != nil {
		if p.port != port {
			return nil, fmt.Errorf("header %s: is %d, and %d in the request's other stream", portforward.PortHeader, port, p.port)
		}
		return p, nil
	}
	if len(f.halves) >= maxHalves {
		return nil, fmt.Errorf("%d streams wait for their other one", maxHalves)
	}
	p := &pair{port: port}
	p.expiry = time.AfterFunc(f.j.server.config.CreationTimeout, func() { f.expire(request, p) })
	f.halves[request] = p
	return p, nil
}

// expire gives up a pair whose second stream has not come.
func (f *forwards) expire(request string, p *pair) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.halves[request] != p {
		return
	}
	delete(f.halves, request)
	for _, s := range []httpstream.Stream{p.data, p.errs} {
		if s != nil {
			_ = s.Reset()
			f.conn.RemoveStreams(s)
		}
	}
}

// add puts a stream where it says it belongs.
func (p *pair) add(s httpstream.Stream, replied <-chan struct{}) error {
	kind := s.Headers().Get(portforward.StreamType)
	slot := &p.data
	switch kind {
	case portforward.StreamTypeData:
	case portforward.StreamTypeError:
		slot = &p.errs
	default:
		return fmt.Errorf("header %s: %q is none", portforward.StreamType, kind)
	}
	if *slot != nil {
		return fmt.Errorf("header %s: the request has a stream of type %s", portforward.StreamType, kind)
	}
	*slot, p.replies = s, append(p.replies, replied)
	return nil
}

// run forwards one connection.
func (f *forwards) run(p *pair) {
	defer f.conn.RemoveStreams(p.data, p.errs)
	if !f.established(p) {
		return
	}
	err := f.j.PortForward(f.j.ctx, f.sandbox, "", int32(p.port), p.data)
	if err == nil {
		_ = p.data.Close()
		_ = p.errs.Close()
		return
	}
	// Errors are those of a client that is gone. Its error stream is ended, not
	// reset, which would overtake the message.
	_, _ = fmt.Fprintf(p.errs, "%v", err)
	_ = p.errs.Close()
	_ = p.data.Reset()
}

// established waits until the client has been told of both streams; false when
// it never will be: writing to them then would block for ever.
func (f *forwards) established(p *pair) bool {
	for _, replied := range p.replies {
		select {
		case <-replied:
		case <-f.j.ctx.Done():
			return false
		}
	}
	for _, s := range []httpstream.Stream{p.data, p.errs} {
		// The library does not tell whether its reply has gone out. Replying
		// again does nothing if it has, and fails if it could not.
		r, ok := s.(interface {
			SendReply(http.Header, bool) error
		})
		if ok && r.SendReply(http.Header{}, false) != nil {
			return false
		}
	}
	return true
}
