package spec

import (
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ResolvConf is the text of a pod's /etc/resolv.conf; nil means that the config
// has no DNS and the host's file is to be copied. ValidatePod has refused
// entries that would break out of their line.
func ResolvConf(dns *runtime.DNSConfig) []byte {
	if dns == nil {
		return nil
	}
	var b strings.Builder
	if len(dns.GetSearches()) > 0 {
		b.WriteString("search " + strings.Join(dns.GetSearches(), " ") + "\n")
	}
	for _, server := range dns.GetServers() {
		b.WriteString("nameserver " + server + "\n")
	}
	if len(dns.GetOptions()) > 0 {
		b.WriteString("options " + strings.Join(dns.GetOptions(), " ") + "\n")
	}
	return []byte(b.String())
}
