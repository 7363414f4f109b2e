// Podshim is a Kubernetes container runtime: a daemon that serves CRI v1 on a
// unix socket, and its operator's subcommands.
//
// Without a subcommand it serves until SIGTERM or SIGINT. Containers belong to
// podmon, so they run on when podshim stops.
//
// Exit status: 0 on success, 1 when the command failed or, for check, when this
// machine cannot run podshim; the reason is on standard error.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main with its surroundings as arguments; it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// A second signal kills: a shutdown that hangs can still be ended by hand.
	context.AfterFunc(ctx, stop)

	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "podshim:", err)
		return 1
	}
	return 0
}
