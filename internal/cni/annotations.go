package cni

import (
	"fmt"
	"maps"
	"math"
	"math/big"
	"net"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
)

// Annotations that say what network a pod wants. Those for the bandwidth are
// Kubernetes' own. For addresses there is no common name; they have effect only
// in networks whose plugins declare the capabilities "ips" and "mac".
const (
	annotationIngress = "kubernetes.io/ingress-bandwidth"
	annotationEgress  = "kubernetes.io/egress-bandwidth"
	annotationIPs     = "cni.podshim.io/ips" // "10.0.0.7,fd00::7"; prefix lengths allowed
	annotationMAC     = "cni.podshim.io/mac"
)

// Bounds that Kubernetes sets for the bandwidth annotations, bits a second.
const (
	minRate = 1_000
	maxRate = 1_000_000_000_000_000
)

// ReadAnnotations fills Bandwidth, IPs, MAC and Annotations from a pod's
// annotations: kubernetes.io/ingress-bandwidth and egress-bandwidth (bits a
// second, a Kubernetes quantity such as "10M"), cni.podshim.io/ips and
// cni.podshim.io/mac.
//
// Errors: errdefs.ErrInvalidArgument naming the annotation; p is unchanged then.
func (p *Pod) ReadAnnotations(annotations map[string]string) error {
	next := *p
	next.Annotations = maps.Clone(annotations)
	var b Bandwidth
	var err error
	if b.IngressRate, b.IngressBurst, err = rate(annotations, annotationIngress); err != nil {
		return err
	}
	if b.EgressRate, b.EgressBurst, err = rate(annotations, annotationEgress); err != nil {
		return err
	}
	if b != (Bandwidth{}) {
		next.Bandwidth = &b
	}
	if next.IPs, err = addresses(annotations[annotationIPs]); err != nil {
		return err
	}
	if mac := annotations[annotationMAC]; mac != "" {
		hw, err := net.ParseMAC(mac)
		if err != nil || len(hw) != 6 {
			return fmt.Errorf("annotation %s: %q is no MAC address: %w", annotationMAC, mac, errdefs.ErrInvalidArgument)
		}
		next.MAC = hw.String()
	}
	*p = next
	return nil
}

// rate reads one bandwidth annotation. The burst is as large as the bandwidth
// plugin takes, so that the rate alone limits.
func rate(annotations map[string]string, key string) (bits, burst uint64, err error) {
	s, ok := annotations[key]
	if !ok {
		return 0, 0, nil
	}
	bits, ok = quantity(s)
	if !ok || bits < minRate || bits > maxRate {
		return 0, 0, fmt.Errorf("annotation %s: %q is no quantity between 1k and 1P: %w", key, s, errdefs.ErrInvalidArgument)
	}
	return bits, math.MaxUint32, nil
}

func addresses(s string) ([]string, error) {
	if s == "" {
		return nil, nil
	}
	var ips []string
	for ip := range strings.SplitSeq(s, ",") {
		ip = strings.TrimSpace(ip)
		_, errAddr := netip.ParseAddr(ip)
		_, errPrefix := netip.ParsePrefix(ip)
		if errAddr != nil && errPrefix != nil {
			return nil, fmt.Errorf("annotation %s: %q is no IP address: %w", annotationIPs, ip, errdefs.ErrInvalidArgument)
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

// units are the suffixes of Kubernetes quantities that make sense for rates.
var units = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}

// quantity reads a Kubernetes quantity, rounded up to a whole number as the API
// server's Quantity.Value does.
func quantity(s string) (uint64, bool) {
	number := strings.TrimRight(s, "kMGTPi")
	unit, ok := units[s[len(number):]]
	// Plain decimals only: big.Rat would take fractions and huge exponents.
	if !ok || len(number) > 20 || strings.Trim(number, "0123456789.") != "" {
		return 0, false
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, false
	}
	r.Mul(r, new(big.Rat).SetInt64(unit))
	up := new(big.Int).Add(r.Num(), new(big.Int).Sub(r.Denom(), big.NewInt(1)))
	up.Quo(up, r.Denom())
	return up.Uint64(), up.IsUint64()
}
