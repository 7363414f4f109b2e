package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	goruntime "runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	runtimeName = "podshim"
	// apiVersion is the version of the CRI that is served.
	apiVersion = "v1"
	// kubeVersion is the version of the version message itself (CRI
	// VersionResponse.version), which has always been this.
	kubeVersion = "0.1.0"
)

// Version tells which runtime this is.
func (s *runtimeService) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{
		Version:           kubeVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    s.Config.Version,
		RuntimeApiVersion: apiVersion,
	}, nil
}

// Status tells whether pods can be run, and why not.
func (s *runtimeService) Status(_ context.Context, req *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	resp := &runtime.StatusResponse{
		Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{
			condition(runtime.RuntimeReady, "MonitorNotReady", s.Runtime()),
			condition(runtime.NetworkReady, "NetworkPluginNotReady", s.Network.Status()),
		}},
		Features: &runtime.RuntimeFeatures{
			SupplementalGroupsPolicy: true,
			// Such a pod has the host's /sys, recursively read-only.
			UserNamespacesHostNetwork: s.Host.IDMapMounts && s.Host.RRO,
			MountOptions:              true,
		},
	}
	for _, name := range slices.Sorted(maps.Keys(s.Handlers)) {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtime.RuntimeHandler{
			Name: name,
			Features: &runtime.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: s.Host.RRO,
				UserNamespaces:          s.Host.IDMapMounts,
			},
		})
	}
	if req.GetVerbose() {
		var err error
		daemon := map[string]int{"goroutines": goruntime.NumGoroutine()}
		if resp.Info, err = info("config", s.Effective, "cni", s.Network.Info(), "host", s.Host, "daemon", daemon); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// condition is met unless err says why not.
func condition(kind, reason string, err error) *runtime.RuntimeCondition {
	if err == nil {
		return &runtime.RuntimeCondition{Type: kind, Status: true}
	}
	return &runtime.RuntimeCondition{Type: kind, Reason: reason, Message: err.Error()}
}

// RuntimeConfig tells kubelet which cgroup driver to use.
func (s *runtimeService) RuntimeConfig(context.Context, *runtime.RuntimeConfigRequest) (*runtime.RuntimeConfigResponse, error) {
	driver := runtime.CgroupDriver_CGROUPFS
	if s.Host.SystemdCgroup {
		driver = runtime.CgroupDriver_SYSTEMD
	}
	return &runtime.RuntimeConfigResponse{Linux: &runtime.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes note of the pods' addresses on this node (CRI
// NetworkConfig.pod_cidr: one range, or one for each family with a comma between).
func (s *runtimeService) UpdateRuntimeConfig(ctx context.Context, req *runtime.UpdateRuntimeConfigRequest) (*runtime.UpdateRuntimeConfigResponse, error) {
	list := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if list == "" {
		return &runtime.UpdateRuntimeConfigResponse{}, nil
	}
	var ranges []netip.Prefix
	for word := range strings.SplitSeq(list, ",") {
		r, err := netip.ParsePrefix(strings.TrimSpace(word))
		if err != nil {
			return nil, fmt.Errorf("runtime_config.network_config.pod_cidr: %q is not a CIDR: %w", word, errdefs.ErrInvalidArgument)
		}
		ranges = append(ranges, r)
	}
	if err := s.Network.SetPodCIDRs(ctx, ranges); err != nil {
		return nil, fmt.Errorf("runtime_config.network_config.pod_cidr: %w", err)
	}
	return &runtime.UpdateRuntimeConfigResponse{}, nil
}

// info makes the verbose part of an answer: keys and values by turns, the values
// as JSON.
func info(pairs ...any) (map[string]string, error) {
	out := make(map[string]string, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		raw, err := json.Marshal(pairs[i+1])
		if err != nil {
			return nil, fmt.Errorf("encode verbose info %s: %w", pairs[i], err)
		}
		out[pairs[i].(string)] = string(raw)
	}
	return out, nil
}
