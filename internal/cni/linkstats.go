package cni

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// InterfaceStats are one interface's counters since it was made
// (IFLA_STATS64): bytes, and packets for the rest.
type InterfaceStats struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Stats reads the counters of every interface, lo too, in the network namespace
// at netnsPath ("": the host's), in the kernel's order. It costs one netlink
// dump.
//
// Errors: errdefs.ErrNotFound without such a namespace.
func Stats(netnsPath string) ([]InterfaceStats, error) {
	var stats []InterfaceStats
	err := Do(netnsPath, func() error {
		links, err := dumpLinks()
		if err != nil {
			return fmt.Errorf("read interface counters: %w", err)
		}
		for _, link := range links {
			a := link.Attrs()
			if a.Statistics == nil {
				continue
			}
			s := a.Statistics
			stats = append(stats, InterfaceStats{
				Name:    a.Name,
				RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
				TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
			})
		}
		return nil
	})
	return stats, err
}

// dumpLinks repeats a dump that a change of the interfaces has interrupted
// (NLM_F_DUMP_INTR): such a dump may miss one.
func dumpLinks() ([]netlink.Link, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	const most = 5
	var links []netlink.Link
	for range most {
		links, err = h.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return links, err
}
