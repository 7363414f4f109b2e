package cni

import (
	"slices"
	"strings"
	"testing"
)

// A plugin that has nothing to do for a pod is not started for it, unless it cannot be told
// that it has not.
func TestIdlePlugins(t *testing.T) {
	chain := func(plugin string) string {
		return `{"cniVersion":"1.0.0","name":"two","plugins":[{"type":"first"},` + plugin + `]}`
	}
	const portmap = `{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`
	ports := Pod{PortMappings: []PortMapping{{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"}}}
	for name, c := range map[string]struct {
		conf    string
		pod     Pod
		started bool
	}{
		"no host ports":              {chain(portmap), Pod{}, false},
		"a port without a host port": {chain(portmap), Pod{PortMappings: []PortMapping{{ContainerPort: 8080}}}, false},
		"a host port":                {chain(portmap), ports, true},
		"no bandwidth":               {chain(`{"type":"bandwidth","capabilities":{"bandwidth":true}}`), ports, false},
		"bandwidth":                  {chain(`{"type":"bandwidth","capabilities":{"bandwidth":true}}`), Pod{Bandwidth: &Bandwidth{IngressRate: 1e6, IngressBurst: 1e6}}, true},
		"bandwidth for all pods":     {chain(`{"type":"bandwidth","ingressRate":1000000,"ingressBurst":1000000,"capabilities":{"bandwidth":true}}`), Pod{}, true},
		"ports for all pods":         {chain(strings.Replace(portmap, `"snat":true`, `"runtimeConfig":{"portMappings":[{"hostPort":1}]}`, 1)), Pod{}, true},
		"not told of ports":          {chain(`{"type":"portmap"}`), Pod{}, true},
		"another plugin":             {chain(strings.Replace(portmap, "portmap", "other", 1)), Pod{}, true},
		"the only plugin":            {`{"cniVersion":"1.0.0","name":"one","plugins":[` + portmap + `]}`, Pod{}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScripted(t, 0, map[string]string{"first": giveIP, "portmap": giveIP, "bandwidth": giveIP, "other": giveIP}, c.conf)
			s.await("the network is ready", isNil)
			pod := testPod("idle")
			pod.PortMappings, pod.Bandwidth = c.pod.PortMappings, c.pod.Bandwidth
			if _, err := s.Add(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			if err := s.Check(t.Context(), pod); err != nil {
				t.Error(err)
			}
			if err := s.Del(t.Context(), pod); err != nil {
				t.Error(err)
			}
			for _, verb := range []string{" ADD", " CHECK", " DEL"} {
				runs := slices.ContainsFunc(s.runs("idle"), func(run string) bool {
					return strings.HasSuffix(run, verb) && !strings.HasPrefix(run, "first ")
				})
				if runs != c.started {
					t.Errorf("started for%s: %v, want %v; the runs: %q", verb, runs, c.started, s.runs("idle"))
				}
			}
		})
	}
}

// A configuration in which programs have the plugins' names and do something else.
func TestIdlePluginsAsked(t *testing.T) {
	s := newScripted(t, 0, map[string]string{"first": giveIP, "portmap": giveIP},
		`{"cniVersion":"1.0.0","name":"two","plugins":[{"type":"first"},{"type":"portmap","capabilities":{"portMappings":true}}]}`)
	s.cfg.IdlePlugins = true
	s.await("the network is ready", isNil)
	if _, err := s.Add(t.Context(), testPod("asked")); err != nil {
		t.Fatal(err)
	}
	if err := s.Del(t.Context(), testPod("asked")); err != nil {
		t.Fatal(err)
	}
	if runs := s.runs("asked"); !slices.Contains(runs, "portmap ADD") || !slices.Contains(runs, "portmap DEL") {
		t.Errorf("runs: %q", runs)
	}
}
