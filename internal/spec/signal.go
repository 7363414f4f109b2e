package spec

import (
	"strconv"
	"strings"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Linux's own numbers of the real-time signals, which glibc and musl shift in
// their SIGRTMIN by those they keep; container runtimes have always counted
// from 34.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// StopSignal is the signal that asks the container to end: the config's, else
// the image's, else SIGTERM. An image with a signal that does not exist gets
// SIGTERM too: its container must be stoppable.
func StopSignal(config *runtime.ContainerConfig, image ocispec.ImageConfig) syscall.Signal {
	if s := config.GetStopSignal(); s != runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
		if n, ok := signalNumber(signalName(s)); ok {
			return n
		}
	}
	if n, ok := signalNumber(image.StopSignal); ok {
		return n
	}
	return syscall.SIGTERM
}

// CRISignal is the CRI's value for a signal (ContainerStatus.stop_signal);
// SIGNAL_RUNTIME_DEFAULT for one it has no value for.
func CRISignal(s syscall.Signal) runtime.Signal {
	if s >= sigRTMin && s <= sigRTMax { // in the order of their numbers there too
		return runtime.Signal_SIGNAL_SIGRTMIN + runtime.Signal(s-sigRTMin)
	}
	return runtime.Signal(runtime.Signal_value["SIGNAL_"+unix.SignalName(s)])
}

// signalName is the usual name of a CRI signal: SIGNAL_SIGRTMINPLUS1 is SIGRTMIN+1.
func signalName(s runtime.Signal) string {
	name := strings.TrimPrefix(s.String(), "SIGNAL_")
	name = strings.Replace(name, "RTMINPLUS", "RTMIN+", 1)
	return strings.Replace(name, "RTMAXMINUS", "RTMAX-", 1)
}

// signalNumber reads "SIGTERM", "term", "15", "SIGRTMIN+3", "SIGRTMAX-1".
func signalNumber(s string) (syscall.Signal, bool) {
	if n, err := strconv.Atoi(s); err == nil {
		return syscall.Signal(n), n > 0 && n <= sigRTMax
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	switch name {
	case "SIGCLD":
		name = "SIGCHLD"
	case "SIGPOLL":
		name = "SIGIO"
	case "SIGIOT":
		name = "SIGABRT"
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, true
	}
	for base, start := range map[string]int{"SIGRTMIN": sigRTMin, "SIGRTMAX": sigRTMax} {
		rest, ok := strings.CutPrefix(name, base)
		if !ok {
			continue
		}
		offset := 0
		if rest != "" {
			var err error
			if offset, err = strconv.Atoi(rest); err != nil || (rest[0] != '+' && rest[0] != '-') {
				return 0, false
			}
		}
		n := start + offset
		return syscall.Signal(n), n >= sigRTMin && n <= sigRTMax
	}
	return 0, false
}
