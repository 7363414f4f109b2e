// Package container is the life of the containers in pod sandboxes.
//
//	         Create           Start           PID 1 ends
//	Creating ------> Created ------> Running ----------> Exited
//	    |               |                                  |
//	    | a step failed |  Start failed (exit code 128)    | Remove
//	    v               +-----------------------> Exited   v
//	(forgotten)                                         (forgotten)
//
// As with sandboxes, a container is on record before it takes anything, what it
// takes is named for its ID, and one list of idempotent steps (release.go) gives
// all of it back, whoever has to: a failed Create, Remove, or the next daemon.
//
// Locks and indexes are package roster's: Create, Start, Remove and the note of an
// exit are serialized by a lock per container. Stop, Exec and Attach hold no lock
// while they wait; readers take none.
package container

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/roster"
)

// State is a step in a container's life; the zero value is none.
type State string

// The states. Creating is not shown to clients.
const (
	Creating State = "creating"
	Created  State = "created"
	Running  State = "running"
	Exited   State = "exited"
)

// Reasons as kubelet and its users know them (CRI ContainerStatus.reason).
const (
	ReasonCompleted  = "Completed"
	ReasonError      = "Error"
	ReasonOOMKilled  = "OOMKilled"
	ReasonStartError = "StartError"
	// ReasonUnknown: the container ended and nobody could see how.
	ReasonUnknown = "Unknown"
)

const (
	// startErrorCode is the exit code of a container that never ran.
	startErrorCode = 128
	// unknownCode stands for an exit code that nobody could see; Reason says so.
	unknownCode = 255
)

// Record is what is known of a container. Published records are never changed.
type Record struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	SandboxID string `json:"sandbox_id"`
	// Config is kubelet's own words, kept whole.
	Config    *runtime.ContainerConfig `json:"-"`
	RawConfig []byte                   `json:"config"`
	// Resources are those in force (UpdateContainerResources); nil: the config's.
	Resources    *runtime.LinuxContainerResources `json:"-"`
	RawResources []byte                           `json:"resources,omitempty"`

	// ImageID is the image's ID, ImageRef a name by digest if it has one.
	ImageID  string `json:"image_id"`
	ImageRef string `json:"image_ref"`

	// VolumeRefs are those of the images that are mounted, by the mount's index in
	// the config; "" for other mounts.
	VolumeRefs map[int]string `json:"volume_refs,omitempty"`

	State      State     `json:"state"`
	CreatedAt  time.Time `json:"created_at"`
	StartedAt  time.Time `json:"started_at,omitzero"`
	FinishedAt time.Time `json:"finished_at,omitzero"`
	ExitCode   int32     `json:"exit_code,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Message    string    `json:"message,omitempty"`

	Process monitor.Process `json:"process"`
	// LogRoot is the pod's log directory, LogPath the file below it.
	LogRoot string `json:"log_root,omitempty"`
	LogPath string `json:"log_path,omitempty"`
	// CgroupsPath is as in the OCI spec: a path, or slice:prefix:name.
	CgroupsPath string         `json:"cgroups_path,omitempty"`
	StopSignal  syscall.Signal `json:"stop_signal,omitempty"`
	User        specs.User     `json:"user"`
	// Failed: Create did not succeed, and what it took could not be released yet.
	Failed bool `json:"failed,omitempty"`
	// Unended: Start failed, and what it started could not be ended yet.
	Unended bool `json:"unended,omitempty"`
	// Kept is as much of the OCI spec as a running container needs, as JSON, for when
	// somebody has emptied the run directory: the process and the limits.
	Kept json.RawMessage `json:"kept,omitempty"`
	// Target is the container whose PID namespace is joined in PID mode TARGET,
	// with its process: a PID alone may be another's by the time of Start.
	Target *Target `json:"target,omitempty"`
}

// Target is a container whose PID namespace another one joins.
type Target struct {
	ID      string          `json:"id"`
	Process monitor.Process `json:"process"`
}

// Container is one container. Its Done is closed when its end has been published,
// or it is known never to run.
type Container = roster.Entry[Record]

// HasLabels tells whether the container has every label of the selector.
func (r *Record) HasLabels(selector map[string]string) bool {
	labels := r.Config.GetLabels()
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// CurrentResources are the resources in force.
func (r *Record) CurrentResources() *runtime.LinuxContainerResources {
	if r.Resources != nil {
		return r.Resources
	}
	return r.Config.GetLinux().GetResources()
}

func name(sandboxID string, c *runtime.ContainerConfig) string {
	return fmt.Sprintf("%s_%s_%d", sandboxID, c.GetMetadata().GetName(), c.GetMetadata().GetAttempt())
}

func (r *Record) encode() ([]byte, error) {
	c := *r
	var err error
	if c.RawConfig, err = proto.Marshal(r.Config); err != nil {
		return nil, fmt.Errorf("encode container config: %w", err)
	}
	if r.Resources != nil {
		if c.RawResources, err = proto.Marshal(r.Resources); err != nil {
			return nil, fmt.Errorf("encode container resources: %w", err)
		}
	}
	return json.Marshal(&c)
}

// Decode reads a record as it was kept.
func Decode(raw []byte) (*Record, error) {
	var r Record
	if err := json.Unmarshal(raw, &r); err != nil {
		return nil, fmt.Errorf("decode container record: %w", err)
	}
	r.Config = new(runtime.ContainerConfig)
	if err := proto.Unmarshal(r.RawConfig, r.Config); err != nil {
		return nil, fmt.Errorf("decode container config: %w", err)
	}
	if r.RawResources != nil {
		r.Resources = new(runtime.LinuxContainerResources)
		if err := proto.Unmarshal(r.RawResources, r.Resources); err != nil {
			return nil, fmt.Errorf("decode container resources: %w", err)
		}
	}
	r.RawConfig, r.RawResources = nil, nil
	return &r, nil
}

// LogFile is the absolute path of the CRI log; empty without one.
func (r *Record) LogFile() string {
	if r.LogPath == "" {
		return ""
	}
	return filepath.Join(r.LogRoot, r.LogPath)
}
