package cni

import (
	"net/netip"
	"time"
)

// Pod is what a network needs to know of a pod sandbox.
type Pod struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid"`
	// Netns is the path at which the pod's network namespace is pinned.
	Netns        string        `json:"netns"`
	PortMappings []PortMapping `json:"portMappings,omitempty"`
	Bandwidth    *Bandwidth    `json:"bandwidth,omitempty"`
	// CgroupParent is passed to plugins that ask for it (capability cgroupPath).
	CgroupParent string `json:"cgroupParent,omitempty"`
	// Annotations are passed to plugins that ask for them (capability
	// io.kubernetes.cri.pod-annotations). [Pod.ReadAnnotations] sets them.
	Annotations map[string]string `json:"annotations,omitempty"`
	// IPs are wished-for addresses, "10.0.0.7" or "10.0.0.7/24" (capability ips).
	IPs []string `json:"ips,omitempty"`
	// MAC is a wished-for hardware address (capability mac).
	MAC string `json:"mac,omitempty"`
	// IPv6 is set for a pod that is to have the kernel's IPv6 whatever its network gives.
	IPv6 bool `json:"ipv6,omitempty"`
	// DNS is the pod's resolver configuration (capability dns).
	DNS *DNS `json:"dns,omitempty"`
}

// DNS is the CNI dns capability's own shape.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
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

// Info is the network as verbose Status tells it.
type Info struct {
	ConfDir string   `json:"confDir"`
	BinDirs []string `json:"binDirs"`
	// Network, File, CNIVersion and Plugins are those of the network that pods
	// get; empty without one.
	Network    string   `json:"network,omitempty"`
	File       string   `json:"file,omitempty"`
	CNIVersion string   `json:"cniVersion,omitempty"`
	Plugins    []string `json:"plugins,omitempty"`
	// PodCIDRs are the node's ranges as kubelet has told them, if it has.
	PodCIDRs []string `json:"podCIDRs,omitempty"`
	// Files are all files of ConfDir in the order they are looked at.
	Files    []FileInfo `json:"files,omitempty"`
	LoadedAt time.Time  `json:"loadedAt"`
	// Error is what Status says, empty when all is well.
	Error string `json:"error,omitempty"`
}
