// Package sandbox is the life of pod sandboxes: the infra container, the
// namespaces that it holds, the pod's network, and the files that all containers
// of the pod share.
//
//	          Run                     infra dies, or Stop begins
//	Creating ------> Ready ---------------------------------------> NotReady
//	   |                                                                |
//	   | a step failed: all is released                                 | Remove
//	   v                                                                v
//	(forgotten)                                                    (forgotten)
//
// A sandbox is on record, as Creating, before it takes anything, and every
// thing it takes has a name that follows from its ID. So what a failed step, a
// Stop, a Remove or a crash leaves is given back by one list of idempotent steps
// (release.go), which may run any number of times.
//
// Locks and indexes are package roster's: each sandbox's operations are serialized
// by a lock per ID, and readers take none.
package sandbox

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/roster"
)

// State is a step in a sandbox's life; the zero value is none.
type State string

// The states. Only Ready and NotReady are shown to clients.
const (
	Creating State = "creating"
	Ready    State = "ready"
	NotReady State = "not-ready"
)

// Record is what is known of a sandbox. Published records are never changed.
type Record struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Handler string `json:"handler,omitempty"`
	// Config is kubelet's own words, kept whole.
	Config    *runtime.PodSandboxConfig `json:"-"`
	RawConfig []byte                    `json:"config"`
	// Updated has the resources and overhead in force, if they were changed.
	Updated    *runtime.LinuxPodSandboxConfig `json:"-"`
	RawUpdated []byte                         `json:"updated,omitempty"`
	CreatedAt  time.Time                      `json:"created_at"`
	State      State                          `json:"state"`
	// Reason says why the sandbox is not ready, for operators.
	Reason string `json:"reason,omitempty"`

	// Infra is PID 1 of the infra container, InfraExit how it ended.
	Infra     monitor.Process `json:"infra"`
	InfraExit *monitor.Exit   `json:"infra_exit,omitempty"`
	// Netns is where the network namespace is pinned; "" is the host's. User is
	// where the user namespace is pinned until infra holds it; "" is the host's.
	Netns string `json:"netns,omitempty"`
	User  string `json:"user,omitempty"`
	// CgroupParent is the pod's cgroup; OwnCgroup tells that it is podshim's to
	// remove, since the client named none.
	CgroupParent string `json:"cgroup_parent"`
	OwnCgroup    bool   `json:"own_cgroup,omitempty"`
	// IPs are the pod's, primary first; NetworkResult what the plugins said.
	IPs           []netip.Addr    `json:"ips,omitempty"`
	Interface     string          `json:"interface,omitempty"`
	NetworkResult json.RawMessage `json:"network_result,omitempty"`
	// ProcessLabel and MountLabel are SELinux's, empty where that is off.
	ProcessLabel string `json:"process_label,omitempty"`
	MountLabel   string `json:"mount_label,omitempty"`
	// Released: processes, network, namespaces and mounts are given back.
	Released bool `json:"released,omitempty"`
	// Failed: Run did not succeed. The name is free, and what could not be
	// released is tried again in the background.
	Failed bool `json:"failed,omitempty"`
}

// Sandbox is one pod sandbox.
type Sandbox = roster.Entry[Record]

// HostNetwork tells whether the pod has the node's network.
func (r *Record) HostNetwork() bool {
	return namespaces(r.Config).GetNetwork() == runtime.NamespaceMode_NODE
}

// HasLabels tells whether the sandbox has every label of the selector.
func (r *Record) HasLabels(selector map[string]string) bool {
	labels := r.Config.GetLabels()
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func namespaces(c *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// name is what a pod sandbox is reserved by: kubelet counts attempt up where it
// wants another one for the same pod.
func name(c *runtime.PodSandboxConfig) string {
	m := c.GetMetadata()
	// A slash is in none of them, so that no two pods can have one name.
	return fmt.Sprintf("%s/%s/%s/%d", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

func (r *Record) encode() ([]byte, error) {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(r.Config)
	if err != nil {
		return nil, fmt.Errorf("encode sandbox config: %w", err)
	}
	c := *r
	c.RawConfig = raw
	if r.Updated != nil {
		if c.RawUpdated, err = proto.Marshal(r.Updated); err != nil {
			return nil, fmt.Errorf("encode sandbox resources: %w", err)
		}
	}
	return json.Marshal(&c)
}

// Decode reads a record as it was kept.
func Decode(raw []byte) (*Record, error) {
	var r Record
	if err := json.Unmarshal(raw, &r); err != nil {
		return nil, fmt.Errorf("decode sandbox record: %w", err)
	}
	r.Config = new(runtime.PodSandboxConfig)
	if err := proto.Unmarshal(r.RawConfig, r.Config); err != nil {
		return nil, fmt.Errorf("decode sandbox config: %w", err)
	}
	if r.RawUpdated != nil {
		r.Updated = new(runtime.LinuxPodSandboxConfig)
		if err := proto.Unmarshal(r.RawUpdated, r.Updated); err != nil {
			return nil, fmt.Errorf("decode sandbox resources: %w", err)
		}
	}
	r.RawConfig, r.RawUpdated = nil, nil
	return &r, nil
}
