package monitor

import "sync"

// queue delivers events in order and never makes the sender wait.
type queue struct {
	out chan Event

	mu     sync.Mutex
	wake   *sync.Cond
	list   []Event
	closed bool
	done   chan struct{} // closed by close; ends a delivery nobody takes
	pump   sync.WaitGroup
}

func newQueue() *queue {
	q := &queue{out: make(chan Event), done: make(chan struct{})}
	q.wake = sync.NewCond(&q.mu)
	q.pump.Go(q.deliver)
	return q
}

func (q *queue) put(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, e)
	q.wake.Signal()
}

func (q *queue) deliver() {
	defer close(q.out)
	for {
		q.mu.Lock()
		for len(q.list) == 0 && !q.closed {
			q.wake.Wait()
		}
		if q.closed {
			q.mu.Unlock()
			return
		}
		e := q.list[0]
		q.list = q.list[1:]
		q.mu.Unlock()
		select {
		case q.out <- e:
		case <-q.done:
			return
		}
	}
}

// close drops what was not delivered: it is in List when the daemon comes back.
func (q *queue) close() {
	q.mu.Lock()
	if !q.closed {
		q.closed = true
		close(q.done)
		q.wake.Signal()
	}
	q.mu.Unlock()
	q.pump.Wait()
}
