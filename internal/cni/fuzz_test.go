package cni

import (
	"context"
	"testing"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
)

// answers is a plugin (invoke.Exec) that says the same to everything, with the
// check that the real runner makes.
type answers struct {
	version.PluginDecoder
	stdout []byte
}

func (a answers) FindInPath(string, []string) (string, error) { return "/plugin", nil }

func (a answers) ExecPlugin(_ context.Context, _ string, _ []byte, environ []string) ([]byte, error) {
	if why := implausible(verbOf(environ), a.stdout); why != "" {
		return nil, &PluginError{Plugin: "fuzzed", Verb: "ADD", Why: why}
	}
	return a.stdout, nil
}

// FuzzPluginResult: whatever a plugin answers, it is a result with addresses or
// an error.
func FuzzPluginResult(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.0.0.1/8"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/8","routes":[{"dst":"0.0.0.0/0"}]}}`,
		`{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.1/8","interface":-1}]}`,
		`{"interfaces":[null]}`, `{"ips":[{}]}`, `{"ips":null}`, `null`, ``, `[]`,
		`{"cniVersion":"1.0.0","ips":[{"address":"::ffff:10.0.0.1/104"}],"routes":[{}],"dns":{"search":[""]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stdout []byte) {
		args := &invoke.Args{Command: "ADD", ContainerID: "x", IfName: ifName}
		raw, err := invoke.ExecPluginWithResult(t.Context(), "/plugin", []byte(`{"cniVersion":"1.0.0","name":"n","type":"t"}`), args, &answers{stdout: stdout})
		if err != nil {
			return
		}
		r, err := readResult(raw)
		if err == nil && (len(r.IPs) == 0 || !r.IPs[0].IsValid()) {
			t.Errorf("a result without addresses: %+v", r)
		}
	})
}

// FuzzConf: a configuration that is taken can be written down and read again.
func FuzzConf(f *testing.F) {
	for _, s := range []string{oneConf, twoConf, realConf, `{}`, `{"name":"n","plugins":[{"type":1}]}`,
		`{"name":"n","cniVersions":["1.0.0","9.0.0"],"disableCheck":"true","plugins":[{"type":"a","capabilities":{"x":true}}]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := parseList(raw)
		if err != nil {
			return
		}
		if len(list.Plugins) == 0 {
			return // more may come from other files, see readConf
		}
		frozen, err := freeze(list)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseList(frozen)
		if err != nil {
			t.Fatalf("%s\nfrozen as %s\n%v", raw, frozen, err)
		}
		if again.Name != list.Name || again.CNIVersion != list.CNIVersion || len(again.Plugins) != len(list.Plugins) ||
			again.DisableCheck != list.DisableCheck || again.DisableGC != list.DisableGC {
			t.Errorf("%+v was frozen as %+v", list, again)
		}
	})
}

func FuzzQuantity(f *testing.F) {
	for _, s := range []string{"10M", "1.5Gi", "1e3", "1/2", "..", "9999999999999999999P", "-1"} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, s string) { quantity(s) })
}
