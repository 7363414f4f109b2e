// Bench sets up podshim and the runtimes that it is compared with side by side,
// gives all of them the same work, pod by pod in turn, and prints what each step
// took, what memory and CPU time it cost, and the ratio to podshim.
//
//	make bench                               everything, in a quarter to half an hour
//	make bench ARGS=-short                   the same with few pods, to try it
//	make bench ARGS='-only sequential,pull'  some parts
//	make bench ARGS='-write docs/performance.md'
//
// Each runtime has a root, a state directory, a socket, a bridge and a cgroup of
// its own. All use the same CNI configuration and plugins, and pull from one
// registry on loopback. Everything happens in namespaces of the bench's own:
// when it ends, or is interrupted, nothing of it is left.
//
// Runtimes are compared within one run only. A time by itself says something
// about the machine, and about what else it was doing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/enclosure"
	"github.com/podshim/podshim/test/private"
)

// options are the flags.
type options struct {
	podshim, tools, peers, images string
	runtimes                      []string
	only                          []string
	sizes                         sizes
	write, log                    string
}

// sizes say how much of each work there is.
type sizes struct {
	pods     int           // of each runtime, one after the other
	batches  int           // of pods at a time
	together int           // pods at a time
	standing int           // pods that stay, while memory and lists are measured
	polls    int           // seconds of kubelet-like polling
	calls    int           // of each list; of each status four times as many
	crowd    int           // pods of podshim alone
	turns    int           // of few of them and all
	rest     time.Duration // before each, see rest
	pulls    int           // of each image
}

var (
	fullSizes  = sizes{pods: 40, batches: 6, together: 6, standing: 100, polls: 20, calls: 100, crowd: 400, turns: 6, rest: 10 * time.Second, pulls: 4}
	shortSizes = sizes{pods: 5, batches: 1, together: 6, standing: 10, polls: 3, calls: 5, crowd: 20, turns: 1, pulls: 1}
)

// parts of the work, in their order.
var parts = []string{"idle", "sequential", "parallel", "standing", "crowd", "pull"}

func main() {
	o := parse()
	if os.Getpid() == 1 {
		os.Exit(initProcess())
	}
	if !enclosure.Inside() {
		os.Exit(outside(o))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse() options {
	var o options
	flag.StringVar(&o.podshim, "podshim", "bin/podshim", "podshim executable; podmon lies beside it")
	flag.StringVar(&o.tools, "tools", "_artifacts/tools", "directory of the CNI plugins")
	flag.StringVar(&o.peers, "peers", "_artifacts/peers", "directory of containerd, its shim, runc, crio and pinns")
	flag.StringVar(&o.images, "images", "_artifacts/images", "where built test images are kept")
	flag.StringVar(&o.write, "write", "", "Markdown file whose part between the bench's marks is to be replaced; the chart goes beside it")
	flag.StringVar(&o.log, "logs", "_artifacts/bench", "directory for the runtimes' logs")
	runtimes := flag.String("runtimes", "podshim,containerd,containerd-tuned,crio", "the runtimes, the first being what the others are compared with; containerd-tuned, unless first, takes part in pull only")
	only := flag.String("only", strings.Join(parts, ","), "the parts of the work")
	short := flag.Bool("short", false, "few pods of everything: to try the bench, not to measure")
	pods := flag.Int("pods", 0, "pods of each runtime, one after the other; 0 is the default")
	crowd := flag.Int("crowd", 0, "pods of the first runtime alone; 0 is the default")
	flag.Parse()
	o.runtimes, o.only = strings.Split(*runtimes, ","), strings.Split(*only, ",")
	o.sizes = fullSizes
	if *short {
		o.sizes = shortSizes
	}
	if *pods > 0 {
		o.sizes.pods = *pods
	}
	if *crowd > 0 {
		o.sizes.crowd = *crowd
	}
	for _, part := range o.only {
		if !slices.Contains(parts, part) {
			fmt.Fprintf(os.Stderr, "bench: -only %s: the parts are %s\n", part, strings.Join(parts, ", "))
			os.Exit(2)
		}
	}
	for _, path := range []*string{&o.podshim, &o.tools, &o.peers, &o.images, &o.log} {
		if abs, err := filepath.Abs(*path); err == nil {
			*path = abs
		}
	}
	return o
}

func (o options) does(part string) bool { return slices.Contains(o.only, part) }

// placeEnv tells the process in the namespaces where everything is to be.
const placeEnv = "PODSHIM_BENCH_PLACE"

// outside makes the place of everything, lets the work be done in namespaces, and
// takes the place away: what was in the namespaces is gone by then, also when the
// work was interrupted.
func outside(o options) int {
	place, err := private.NewPlace("bench")
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	code := enclosure.Enter(unix.CLONE_NEWPID, placeEnv+"="+place.Dir)
	var errs []error
	for i := range o.runtimes {
		errs = append(errs, nth(place, i).Remove())
	}
	if err := errors.Join(append(errs, place.Remove())...); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
		return 1
	}
	return code
}

// nth is the place of one runtime within that of all. Names of bridges are made
// of a name's last letters.
func nth(all *private.Place, i int) *private.Place {
	return &private.Place{Dir: all.Path(fmt.Sprint(i)), Name: fmt.Sprintf("%s%d", all.Name, i)}
}

// initProcess is the first process of the PID namespace: it collects what is
// orphaned there, and ends with the bench itself.
func initProcess() int {
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		fmt.Fprintln(os.Stderr, "bench: mount proc:", err)
		return 1
	}
	code, err := enclosure.Reap()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	return code
}
