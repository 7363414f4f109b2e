package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/spawn"
)

const (
	// maxOutput bounds what is read of a plugin's stdout and of its stderr.
	// Results of real plugins have a few hundred bytes.
	maxOutput = 1 << 20
	// maxQuoted bounds what of it gets into an error.
	maxQuoted = 400
	// pipeGrace is how long a plugin that has exited may leave its output open
	// in a child of its own (a daemon that forgot to close it).
	pipeGrace = time.Second
)

// PluginError is a plugin that did not do what it was asked.
type PluginError struct {
	Plugin, Verb string // "bridge", "ADD"
	// Code is the plugin's own error code (CNI spec, section "Error"), 0 if it
	// gave none.
	Code uint
	// Why is the plugin's message, or what went wrong with running it.
	Why string
	// Stderr is the end of what the plugin wrote there.
	Stderr string
	// Hint is what the operator can do; it may be empty.
	Hint string
	// class is the errdefs (or context) class, nil if the plugin only said no.
	class error
}

// Error reads "plugin bridge (ADD): why; stderr: ...; hint".
func (e *PluginError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plugin %s (%s): %s", e.Plugin, e.Verb, e.Why)
	if e.Code != 0 {
		fmt.Fprintf(&b, " (code %d)", e.Code)
	}
	if e.Stderr != "" {
		fmt.Fprintf(&b, "; stderr: %s", e.Stderr)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "; %s", e.Hint)
	}
	return b.String()
}

// Unwrap gives the error's class: errdefs.ErrUnavailable for a plugin that is
// missing or hung, the context's error for a caller that gave up.
func (e *PluginError) Unwrap() error { return e.class }

// runner executes plugins for libcni (invoke.Exec), each with a time limit, in
// a process group that is killed as a whole at the limit, with bounded output.
// It has no state that changes and serves any number of goroutines.
type runner struct {
	version.PluginDecoder
	limit time.Duration
}

var _ invoke.Exec = (*runner)(nil)

// FindInPath finds a plugin's executable in dirs.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(plugin, dirs)
	if err == nil {
		return path, nil
	}
	return "", &PluginError{
		Plugin: plugin, Verb: "find", Why: "not in " + strings.Join(dirs, ", "),
		Hint:  "install it there or correct the plugin directories in the configuration",
		class: errdefs.ErrUnavailable,
	}
}

// ExecPlugin runs the plugin once with stdin, and gives its stdout, which is a
// JSON object (or nothing, where a verb answers nothing).
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	perr := &PluginError{Plugin: filepath.Base(path), Verb: verbOf(environ)}
	runCtx, cancel := context.WithTimeout(ctx, r.limit)
	defer cancel()
	var stdout, stderr bounded
	err := run(runCtx, path, stdin, environ, &stdout, &stderr)
	perr.Stderr = quote(stderr.tail())
	switch {
	case ctx.Err() != nil && err != nil:
		perr.Why, perr.class = "killed, the caller gave up waiting", context.Cause(ctx)
	case runCtx.Err() != nil && err != nil:
		perr.Why = fmt.Sprintf("no answer in %s, killed", r.limit)
		perr.Hint = "see what it waits for (its IPAM, its API server, iptables' lock), or raise the plugin time limit"
		perr.class = errdefs.ErrUnavailable
	case stdout.overflow:
		perr.Why = fmt.Sprintf("wrote more than %d bytes of output, killed", maxOutput)
	case err != nil:
		perr.explain(err, stdout.buf.Bytes())
	default:
		if why := implausible(perr.Verb, stdout.buf.Bytes()); why != "" {
			perr.Why = fmt.Sprintf("%s: %s", why, quote(stdout.buf.Bytes()))
			return nil, perr
		}
		return stdout.buf.Bytes(), nil
	}
	return nil, perr
}

// run executes path, again while another process is still writing the file: a
// node's network installs its plugins while pods already ask for them.
func run(ctx context.Context, path string, stdin []byte, environ []string, stdout, stderr *bounded) error {
	for {
		err := runOnce(ctx, path, stdin, environ, stdout, stderr)
		if !errors.Is(err, unix.ETXTBSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// runOnce starts the plugin and waits for its end and its output's. Where ctx ends
// before, the plugin's group is killed, since what hangs is as a rule a child:
// iptables, an IPAM plugin, a shell script's sleep.
func runOnce(ctx context.Context, path string, stdin []byte, environ []string, stdout, stderr *bounded) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stdout.full = cancel // a plugin that floods stdout is killed
	if err := ctx.Err(); err != nil {
		return err
	}
	var ours, its [3]*os.File // the ends of its stdin, stdout and stderr
	shut := func(files [3]*os.File) {
		for _, f := range files {
			f.Close()
		}
	}
	defer func() { shut(ours); shut(its) }()
	for i := range its {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		ours[i], its[i] = r, w
	}
	ours[0], its[0] = its[0], ours[0]
	process, err := spawn.Process{Path: path, Args: []string{path}, Env: pluginEnv(environ), Dir: "/", Files: its[:], Setpgid: true}.Start()
	if err != nil {
		return err
	}
	shut(its)

	var talk sync.WaitGroup
	talk.Go(func() {
		ours[0].Write(stdin) // a plugin need not read all of it
		ours[0].Close()
	})
	talk.Go(func() { io.Copy(stdout, ours[1]) })
	talk.Go(func() { io.Copy(stderr, ours[2]) })
	said := closedAfter(talk.Wait)
	// Its PID and its group stay its own until it is reaped.
	dead := closedAfter(func() {
		for unix.Waitid(unix.P_PID, process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	})
	var cut error // why it could not do or say all it had to
	select {
	case <-dead:
	case <-ctx.Done():
		select {
		case <-dead: // as well
		default:
			cut = ctx.Err()
			unix.Kill(-process.Pid, unix.SIGKILL)
			process.Kill() // it may have left its group
			<-dead
		}
	}
	state, err := process.Wait()
	select {
	case <-said:
	case <-time.After(pipeGrace):
		cut = ctx.Err()
		shut(ours)
		<-said
	}
	switch {
	case err != nil:
		return fmt.Errorf("wait for process %d: %w", process.Pid, err)
	case !state.Success():
		return errors.New(state.String())
	}
	return cut
}

// closedAfter gives a channel that is closed when f has returned.
func closedAfter(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

// pluginEnv is the daemon's environment, as the CNI spec has it, without what
// systemd meant for the daemon alone, and with a PATH: plugins run iptables, tc
// and each other.
func pluginEnv(environ []string) []string {
	env := slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		key, value, _ := strings.Cut(kv, "=")
		return key == "PATH" && value == "" || slices.Contains([]string{"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC"}, key)
	})
	if !slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") }) {
		env = append(env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	return env
}

// explain fills in why a plugin that ran and failed did so: its JSON error if
// there is one.
func (e *PluginError) explain(err error, stdout []byte) {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && (said.Msg != "" || said.Code != 0) {
		e.Code = said.Code
		e.Why = quote([]byte(said.Msg))
		if said.Details != "" {
			e.Why += ": " + quote([]byte(said.Details))
		}
		if said.Code == types.ErrTryAgainLater {
			e.class = errdefs.ErrUnavailable
		}
		return
	}
	e.Why = err.Error()
	if len(bytes.TrimSpace(stdout)) > 0 {
		e.Why += ": " + quote(stdout)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOEXEC) || errors.Is(err, unix.ENOENT) {
		e.Hint = "the file cannot be executed on this machine: install it again"
		e.class = errdefs.ErrUnavailable
	}
}

// implausible says what is wrong with a successful answer before libcni's
// decoders see it: they take null entries for real ones.
func implausible(verb string, stdout []byte) string {
	if verb != "ADD" {
		return ""
	}
	if len(bytes.TrimSpace(stdout)) == 0 {
		return "answered nothing"
	}
	var result map[string]json.RawMessage
	if json.Unmarshal(stdout, &result) != nil || result == nil {
		return "answered something that is no CNI result"
	}
	for _, key := range []string{"interfaces", "ips", "routes"} {
		var list []map[string]any
		if raw, ok := result[key]; ok && json.Unmarshal(raw, &list) != nil {
			return fmt.Sprintf("answered a result whose %s is no list of objects", key)
		}
		if slices.ContainsFunc(list, func(entry map[string]any) bool { return entry == nil }) {
			return fmt.Sprintf("answered a result whose %s has an empty entry", key)
		}
	}
	return ""
}

func verbOf(environ []string) string {
	for _, kv := range environ {
		if verb, ok := strings.CutPrefix(kv, "CNI_COMMAND="); ok {
			return verb
		}
	}
	return "?"
}

// quote makes plugin output fit for one line of a log or an error.
func quote(b []byte) string {
	s := strings.ToValidUTF8(strings.TrimSpace(string(b[:min(len(b), maxQuoted)])), "?")
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	if len(b) > maxQuoted {
		s += "..."
	}
	return s
}

// bounded keeps up to maxOutput bytes and drops the rest.
type bounded struct {
	buf      bytes.Buffer
	overflow bool
	full     func() // called when there is more, may be nil
}

func (b *bounded) Write(p []byte) (int, error) {
	room := maxOutput - b.buf.Len()
	b.buf.Write(p[:min(room, len(p))])
	if len(p) > room && !b.overflow {
		b.overflow = true
		if b.full != nil {
			b.full()
		}
	}
	return len(p), nil
}

// tail is the last part, where the reason is.
func (b *bounded) tail() []byte {
	all := bytes.TrimSpace(b.buf.Bytes())
	return all[max(0, len(all)-maxQuoted):]
}
