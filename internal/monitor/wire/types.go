package wire

import (
	"os"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// StartRequest describes one container to create and start.
type StartRequest struct {
	// ID is the container's (or sandbox's) ID; one podmon never holds it twice.
	ID string `json:"id"`
	// Spec is the whole OCI description. Root.Path is mounted already;
	// Process.Terminal decides between pipes and a pseudo terminal.
	Spec *specs.Spec `json:"spec"`
	// Stdin keeps standard input open; without it the container reads /dev/null.
	// A terminal is its own standard input, whatever Stdin says.
	Stdin bool `json:"stdin,omitempty"`
	// LogRoot and LogPath name the CRI log: LogPath is relative to LogRoot and
	// may not leave it. An empty LogPath means that nobody reads the output
	// (stdout and stderr are /dev/null when Discard is set, else attachable).
	LogRoot string `json:"log_root,omitempty"`
	LogPath string `json:"log_path,omitempty"`
	// Discard gives the container /dev/null for all its stdio (infra).
	Discard bool `json:"discard,omitempty"`
	// Pause: the program is package infra's, so that any seccomp profile in Spec may be
	// replaced by a filter that leaves what this program calls.
	Pause bool `json:"pause,omitempty"`
}

// Process identifies a running process for good: a PID alone may be reused.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks after boot, field 22 of /proc/PID/stat
}

// Exit is how a process ended.
type Exit struct {
	// Code is 0-255, or 128+signal. It means nothing unless Known: the kernel
	// tells a code to the parent only (before Linux 6.15), and a code nobody
	// heard is unknown, never invented.
	Code  int32 `json:"code"`
	Known bool  `json:"known"`
	// OOMKilled: the kernel's OOM killer killed the process, or one of its cgroup and
	// the process ended with that one's code, 137.
	OOMKilled bool      `json:"oom_killed,omitempty"`
	At        time.Time `json:"at"`
}

// Status is what a monitor knows of one container.
type Status struct {
	ID      string  `json:"id"`
	Process Process `json:"process"`
	// Exit is nil while PID 1 runs.
	Exit *Exit `json:"exit,omitempty"`
}

// Event tells that a container's PID 1 ended, its output is wholly in the log,
// and no process of it is left. (One that cannot be killed holds the event up for
// half a minute, and Delete for as long as it is there.)
type Event struct {
	ID   string `json:"id"`
	Exit Exit   `json:"exit"`
}

// ExecRequest runs a process in a running container.
type ExecRequest struct {
	ContainerID string `json:"container_id"`
	// Process is complete: args, env, cwd, user, capabilities, terminal.
	Process *specs.Process `json:"process"`
	// The ends the process gets; nil is /dev/null. Unused with a terminal.
	// The caller closes its copies when Exec has returned.
	Stdin  *os.File `json:"-"`
	Stdout *os.File `json:"-"`
	Stderr *os.File `json:"-"`
}

// Attached names an attachment of this connection.
type Attached struct {
	Attachment uint64 `json:"attachment"`
}

// Names of the descriptors that travel with a message (Message.Files).
const (
	FilePidfd   = "pidfd"   // of PID 1
	FileStdin   = "stdin"   // podmon's write end, or an exec's read end
	FileStdout  = "stdout"  // podmon's read end, or an exec's or attacher's write end
	FileStderr  = "stderr"  // as stdout
	FileConsole = "console" // master of a pseudo terminal
)

// ProcessFile, beside the socket, is podmon's own Process as JSON: who to kill
// when nobody can be talked to.
const ProcessFile = "process.json"

// Hello is podmon's answer to the first request of a connection.
type Hello struct {
	Version int `json:"version"`
	// Process is podmon's own.
	Process Process `json:"process"`
	// ExitInfo tells whether this kernel gives exit codes to a process that is
	// not the parent, so that running containers can change monitors and keep
	// their exit codes exact.
	ExitInfo bool `json:"exit_info"`
	// Build is the SHA-256 of its program, as it was told at its start.
	Build string `json:"build"`
	// SystemdCgroup is how it makes cgroups.
	SystemdCgroup bool `json:"systemd_cgroup"`
	// Retiring: it takes no new containers any more.
	Retiring bool `json:"retiring"`
	// Containers are all that this podmon holds.
	Containers []Status `json:"containers"`
}

// Ref names a container.
type Ref struct {
	ID string `json:"id"`
}

// Signal asks for a signal to PID 1, or to each process of the container.
type Signal struct {
	ID     string `json:"id"`
	Signal int    `json:"signal"`
	All    bool   `json:"all,omitempty"`
}

// ExecStarted is the answer to OpExec.
type ExecStarted struct {
	Exec    uint64  `json:"exec"` // names it on this connection
	Process Process `json:"process"`
}

// ExecRef names an exec of this connection.
type ExecRef struct {
	Exec   uint64 `json:"exec"`
	Signal int    `json:"signal,omitempty"`
}

// Update changes a container's cgroup limits, and its processes' oom_score_adj
// unless that is nil.
type Update struct {
	ID          string                `json:"id"`
	Resources   *specs.LinuxResources `json:"resources"`
	OOMScoreAdj *int                  `json:"oom_score_adj,omitempty"`
}
