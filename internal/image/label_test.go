package image

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
)

// A label is an option of overlays; what can be is made one, and nothing else is
// changed, the caller's options least of all.
func TestLabelledMounts(t *testing.T) {
	const label = `context="l"`
	for name, tc := range map[string]struct {
		in        mount.Mount
		kind      string
		options   []string
		unchanged bool
	}{
		"overlay": {in: mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}},
			kind: "overlay", options: []string{"lowerdir=/a:/b", label}},
		"view of one layer": {in: mount.Mount{Type: "bind", Source: "/a", Options: []string{"ro", "rbind"}},
			kind: "overlay", options: []string{"lowerdir=/a:/target", label}},
		"ID-mapped view": {in: mount.Mount{Type: "bind", Source: "/a", Options: []string{"ro", "rbind", "uidmap=0:1:1", "gidmap=0:1:1"}}, unchanged: true},
		"writable bind":  {in: mount.Mount{Type: "bind", Source: "/a", Options: []string{"rw", "rbind"}}, unchanged: true},
	} {
		before := slices.Clone(tc.in.Options)
		got := labelled(tc.in, "/target", "l")
		if tc.unchanged {
			tc.kind, tc.options = tc.in.Type, before
		}
		if got.Type != tc.kind || !slices.Equal(got.Options, tc.options) || !slices.Equal(tc.in.Options, before) {
			t.Errorf("%s: %s %q, want %s %q", name, got.Type, got.Options, tc.kind, tc.options)
		}
	}
}
