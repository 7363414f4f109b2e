package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/containernetworking/cni/libcni"
)

// givesIPv4Only tells it of a network whose own configuration says that its pods have IPv4
// addresses and no others: bridge or ptp with the ranges of host-local, and after it only
// plugins that add no address. Of any other network it is not known.
func givesIPv4Only(list *libcni.NetworkConfigList) bool {
	for i, p := range list.Plugins {
		which := []string{"portmap", "bandwidth", "firewall"}
		if i == 0 {
			which = []string{"bridge", "ptp"}
		}
		if !slices.Contains(which, p.Network.Type) {
			return false
		}
	}
	if len(list.Plugins) == 0 {
		return false
	}
	type pool struct {
		Subnet string `json:"subnet"`
	}
	var conf struct {
		IPAM struct {
			Type string `json:"type"`
			pool
			Ranges [][]pool `json:"ranges"`
		} `json:"ipam"`
	}
	if json.Unmarshal(list.Plugins[0].Bytes, &conf) != nil || conf.IPAM.Type != "host-local" {
		return false
	}
	pools := slices.Concat(conf.IPAM.Ranges...)
	if conf.IPAM.Subnet != "" {
		pools = append(pools, conf.IPAM.pool)
	}
	return len(pools) > 0 && !slices.ContainsFunc(pools, func(p pool) bool {
		prefix, err := netip.ParsePrefix(p.Subnet)
		return err != nil || !prefix.Addr().Is4()
	})
}

// withoutIPv6 has the interfaces that a network namespace is given from now on begin with
// IPv6 off (disable_ipv6, Documentation/networking/ip-sysctl.rst); lo keeps its own. A plugin
// that gives an IPv6 address sets IPv6 on, the reference plugins do: Docker's containers have
// begun so for long, and that they once did not was CVE-2024-32473.
//
// On a network that gives no IPv6 address nobody guards IPv6: by link-local ones pods reach each
// other past rules for IPv4, and believe a neighbour that plays router. And each multicast report
// and router solicitation goes to all ports of the bridge, under the lock that plugins wait for.
func withoutIPv6(netns string) error {
	return Do(netns, func() error {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return fmt.Errorf("set IPv6 off: %w", err)
		}
		return nil
	})
}
