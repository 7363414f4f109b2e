// Command critest runs cri-tools' conformance suite against a podshim of its
// own and checks that the run leaves nothing on the machine.
//
//	go run ./test/critest                     the whole suite, then streaming over WebSocket
//	go run ./test/critest -repeat 5           five runs in a row
//	go run ./test/critest -focus PodSandbox   some specs only
//	go run ./test/critest -infra-image registry.k8s.io/pause:3.9
//	go run ./test/critest -runtime-handler other
//	go run ./test/critest -runtime containerd the same with a containerd, to compare
//	go run ./test/critest -benchmark          the suite's benchmarks
//
// The images come from test/images, the programs from `make build tools`.
// critest itself must be the only user of the runtime, wants host ports 12000
// to 12003, and makes mounts and shared memory on the host; so the run lives
// in network, mount and IPC namespaces of its own. Everything in them that is
// there at the end and was not at the start is a leak, and so is every process,
// cgroup, IP reservation and file of the daemon's. A leak fails the run.
//
// The last line is "critest: N passed, N failed, N skipped". A spec may be
// skipped only for a reason that skips.go gives; any other skip fails the run,
// because a runtime could skip its way through. Reports are kept in the
// artifacts directory. No spec is ever run again to make it pass.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/podshim/podshim/test/enclosure"
)

// options are the flags.
type options struct {
	runtime   string
	podshim   string
	tools     string
	peers     string
	images    string
	artifacts string

	handler    string
	infraImage string
	focus      string
	seed       int64
	repeat     int
	webSocket  bool
	benchmark  bool
	verbose    bool
}

func main() {
	o := parse()
	if !enclosure.Inside() {
		os.Exit(enclosure.Enter(0))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		os.Exit(1)
	}
}

func parse() options {
	var o options
	flag.StringVar(&o.runtime, "runtime", "podshim", "runtime to test: podshim, or containerd (from -peers)")
	flag.StringVar(&o.podshim, "podshim", "bin/podshim", "podshim executable; podmon lies beside it")
	flag.StringVar(&o.tools, "tools", "_artifacts/tools", "directory of critest and the CNI plugins")
	flag.StringVar(&o.peers, "peers", "_artifacts/peers", "directory of containerd, its shim and runc")
	flag.StringVar(&o.images, "images", "_artifacts/images", "where built test images are kept")
	flag.StringVar(&o.artifacts, "artifacts", "_artifacts/critest", "directory for reports and logs")
	flag.StringVar(&o.handler, "runtime-handler", "", "run all pods with a runtime handler of this name")
	flag.StringVar(&o.infraImage, "infra-image", "", "run with this infra_image instead of the embedded pause")
	flag.StringVar(&o.focus, "focus", "", "run only specs that match this regular expression")
	flag.Int64Var(&o.seed, "seed", 0, "seed of the random order; 0 picks one")
	flag.IntVar(&o.repeat, "repeat", 1, "how many runs in a row")
	flag.BoolVar(&o.webSocket, "websocket", true, "run the streaming specs again over WebSocket")
	flag.BoolVar(&o.benchmark, "benchmark", false, "run the suite's benchmarks instead of its specs")
	flag.BoolVar(&o.verbose, "v", false, "show critest's whole output, not only failures")
	flag.Parse()
	if o.seed == 0 {
		o.seed = time.Now().Unix()
	}
	for _, path := range []*string{&o.podshim, &o.tools, &o.peers, &o.images, &o.artifacts} {
		if abs, err := filepath.Abs(*path); err == nil {
			*path = abs
		}
	}
	return o
}
