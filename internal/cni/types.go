package cni

import "net/netip"

// Pod is what a network needs to know of a pod sandbox.
type Pod struct {
	ID, Name, Namespace, UID string
	// Netns is the path at which the pod's network namespace is pinned.
	Netns        string
	PortMappings []PortMapping
	Bandwidth    *Bandwidth
	// CgroupParent is passed to plugins that ask for it (capability cgroupPath).
	CgroupParent string
}

// PortMapping is the CNI portMappings capability's own shape.
type PortMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp, sctp
	HostIP        string `json:"hostIP,omitempty"`
}

// Bandwidth is the CNI bandwidth capability: bits a second, burst in bits.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// Result is what the pod got.
type Result struct {
	// IPs are those of the pod's default interface (eth0), the first one is the
	// pod's primary IP (CRI PodSandboxNetworkStatus).
	IPs []netip.Addr
	// Interface is the default interface's name in the pod.
	Interface string
	// Raw is the plugins' result as JSON, for verbose info.
	Raw []byte
}
