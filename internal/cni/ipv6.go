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
	type route struct {
		Dst string `json:"dst"`
	}
	var conf struct {
		IPAM struct {
			Type string `json:"type"`
			pool
			Ranges [][]pool `json:"ranges"`
			Routes []route  `json:"routes"`
		} `json:"ipam"`
	}
	if json.Unmarshal(list.Plugins[0].Bytes, &conf) != nil || conf.IPAM.Type != "host-local" {
		return false
	}
	pools := slices.Concat(conf.IPAM.Ranges...)
	if conf.IPAM.Subnet != "" {
		pools = append(pools, conf.IPAM.pool)
	}
	// An IPv6 route is one that the plugin makes without setting IPv6 on.
	return len(pools) > 0 &&
		!slices.ContainsFunc(pools, func(p pool) bool { return !isIPv4(p.Subnet) }) &&
		!slices.ContainsFunc(conf.IPAM.Routes, func(r route) bool { return !isIPv4(r.Dst) })
}

func isIPv4(prefix string) bool {
	p, err := netip.ParsePrefix(prefix)
	return err == nil && p.Addr().Is4()
}

// withoutIPv6 has the interfaces that a network namespace is given begin with IPv6 off
// (disable_ipv6, Documentation/networking/ip-sysctl.rst), until back is called; they stay so, what
// comes later and lo are as ever. A plugin that gives an IPv6 address sets IPv6 on, the reference
// plugins do: Docker's containers have begun so for long, and that they once did not was
// CVE-2024-32473.
//
// On a network that gives no IPv6 address nobody guards IPv6: by link-local ones pods reach each
// other past rules for IPv4, and believe a neighbour that plays router. And each multicast report
// and router solicitation goes to all ports of the bridge, under the lock that plugins wait for.
func withoutIPv6(netns string) (back func() error, err error) {
	var f *os.File
	err = Do(netns, func() (err error) {
		// It stays the namespace's own file, wherever it is written from.
		f, err = os.OpenFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", os.O_RDWR, 0)
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		return func() error { return nil }, nil // a kernel without IPv6
	}
	if err != nil {
		return nil, fmt.Errorf("set IPv6 off: %w", err)
	}
	was := make([]byte, 16)
	n, err := f.ReadAt(was, 0)
	if n == 0 {
		return nil, errors.Join(fmt.Errorf("read whether IPv6 is off: %w", err), f.Close())
	}
	if _, err := f.WriteAt([]byte("1"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("set IPv6 off: %w", err), f.Close())
	}
	return func() error {
		_, err := f.WriteAt(was[:n], 0)
		return errors.Join(err, f.Close())
	}, nil
}
