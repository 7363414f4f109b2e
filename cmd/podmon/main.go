// The number of CPUs is no matter of cgroups here, and "podmon init", which has one,
// need not look for its own.
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Podmon is the parent of every container on the node. The daemon starts it from
// a sealed memfd and talks to it over a socket; it is not meant to be run by hand:
//
//	podmon serve RUNDIR INSTANCE BUILD [systemd]
//
// It listens on RUNDIR/podmon/INSTANCE/sock and tells so by closing descriptor
// 3. It ends when the daemon retires it, or when its run directory is removed while it
// holds nothing, and never otherwise: containers and their output depend on it, and it
// drops SIGTERM, SIGINT and SIGHUP. When it is killed all the same, the daemon starts
// another one that takes over.
//
// It runs itself again: as "podmon container", "podmon pause" and "podmon exec" for what it
// starts alone, as "podmon init" and "podmon start" for what libcontainer starts, as "podmon
// filter" to compile a seccomp profile.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // joins namespaces before Go starts
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/cmd/podmon/internal/container"
	"github.com/podshim/podshim/cmd/podmon/internal/filter"
	"github.com/podshim/podshim/cmd/podmon/internal/server"
)

func init() {
	if len(os.Args) == 2 && os.Args[1] == "filter" {
		runtime.LockOSThread()
		filter.Main()
	}
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
	// Keeps the first thread for main. At each start libcontainer has a goroutine join
	// the container's mount namespace and throws its thread away, which Go cannot do
	// with the first one: it would stay there, hold the namespace, and be what /proc/self
	// shows.
	runtime.LockOSThread()
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		logrus.WithError(err).Error("podmon ends")
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 4 || args[0] != "serve" {
		return errors.New("podshim starts podmon by itself; usage: podmon serve RUNDIR INSTANCE BUILD [systemd]")
	}
	runDir, instance := args[1], args[2]
	defaultSignals()
	// Caught and dropped, not ignored: containers would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	syscall.Umask(0o022) // containers inherit it
	score, err := protect()
	if err != nil {
		return err
	}
	// For "podmon init" only; this process has read its own already.
	if err := os.Setenv("GOMAXPROCS", "1"); err != nil {
		return err
	}
	s, err := server.New(container.Config{
		RunDir: runDir, Owner: instance, OOMScoreAdj: max(score, 0),
		Build: args[3], SystemdCgroup: len(args) > 4 && args[4] == "systemd",
	})
	if err != nil {
		return err
	}
	dir := filepath.Join(runDir, "podmon", instance)
	l, err := s.Listen(dir)
	if err != nil {
		return err
	}
	if err := os.NewFile(3, "ready").Close(); err != nil {
		return fmt.Errorf("tell that podmon is ready: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Guard(l, dir) }()
	return <-served
}

// protect asks the kernel to kill others first when memory runs out, and returns
// the score from before. Containers get none below 0 unless they ask for it (the
// daemon's unit has -999), and none below this one, which may not be allowed. Where it is not allowed to
// (CAP_SYS_RESOURCE), the lowest score that is allowed is the one podmon has.
func protect() (before int, err error) {
	const file, lowest = "/proc/self/oom_score_adj", -999
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	if before, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(lowest)), 0); err != nil {
		logrus.WithError(err).Info("oom_score_adj stays as it is")
	}
	return before, nil
}
