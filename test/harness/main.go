package harness

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
)

var shared struct {
	once sync.Once
	tb   mainTB
	opts Options
	node *Node
}

// Main runs a package's tests around one shared node, which is made when the
// first test asks for it. It returns the exit code: what the node leaves behind
// fails the package.
func Main(m *testing.M, opts Options) int {
	shared.opts = opts
	code := m.Run()
	shared.tb.end()
	removeBinaries()
	if shared.tb.failed && code == 0 {
		code = 1
	}
	return code
}

// Shared is the package's node as test t sees it; t needs root.
func Shared(t *testing.T) *Node {
	t.Helper()
	NeedRoot(t)
	shared.once.Do(func() {
		// Fatalf ends a goroutine in a test; here it must end the node's making.
		done := make(chan struct{})
		go func() {
			defer close(done)
			shared.node = Start(&shared.tb, shared.opts)
		}()
		<-done
	})
	if shared.node == nil {
		t.Fatalf("no shared node; see above")
	}
	return shared.node.With(t)
}

// mainTB stands for the whole package.
type mainTB struct {
	mu       sync.Mutex
	failed   bool
	cleanups []func()
}

func (*mainTB) Helper()      {}
func (*mainTB) Name() string { return "shared node" }

func (*mainTB) Logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "shared node: "+format+"\n", args...)
}

func (m *mainTB) Errorf(format string, args ...any) {
	m.Logf(format, args...)
	m.mu.Lock()
	m.failed = true
	m.mu.Unlock()
}

func (m *mainTB) Fatalf(format string, args ...any) {
	m.Errorf(format, args...)
	runtime.Goexit()
}

func (m *mainTB) Failed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failed
}

func (m *mainTB) Cleanup(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cleanups = append(m.cleanups, f)
}

func (m *mainTB) end() {
	m.mu.Lock()
	cleanups := m.cleanups
	m.mu.Unlock()
	for _, f := range slices.Backward(cleanups) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			f()
		}()
		<-done
	}
}
