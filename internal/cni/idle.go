package cni

import (
	"encoding/json"
	"slices"

	"github.com/containernetworking/cni/libcni"
)

// idle are the reference plugins that do nothing but for the value of one capability:
// without it ADD answers the result it was given, and DEL and CHECK nothing
// (containernetworking/plugins, plugins/meta/portmap and bandwidth, cmdAdd to cmdCheck).
// Each start of portmap starts iptables twice before it finds that out. The keys are those
// of a configuration by which that stays so.
var idle = map[string]struct {
	capability string
	keys       []string
}{
	"portmap": {"portMappings", []string{
		"type", "capabilities", "backend", "snat", "conditionsV4", "conditionsV6", "masqAll", "markMasqBit", "externalSetMarkChain",
	}},
	"bandwidth": {"bandwidth", []string{"type", "capabilities"}},
}

// withoutIdle leaves out of the list the plugins that have nothing to do for a pod with
// these values for capabilities. What is left out of ADD is left out of the pod's record,
// and so of CHECK and DEL.
func withoutIdle(list *libcni.NetworkConfigList, capabilities map[string]any) *libcni.NetworkConfigList {
	needed := *list
	needed.Plugins = nil
	for i, p := range list.Plugins {
		if i == 0 || !isIdle(p, capabilities) {
			needed.Plugins = append(needed.Plugins, p)
		}
	}
	return &needed
}

// isIdle tells it of a plugin that comes after others.
func isIdle(p *libcni.PluginConfig, capabilities map[string]any) bool {
	known, ok := idle[p.Network.Type]
	if _, asked := capabilities[known.capability]; !ok || asked || !p.Network.Capabilities[known.capability] {
		return false
	}
	var conf map[string]json.RawMessage
	if json.Unmarshal(p.Bytes, &conf) != nil {
		return false
	}
	for key := range conf {
		if !slices.Contains(known.keys, key) {
			return false
		}
	}
	return true
}
