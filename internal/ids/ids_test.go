package ids

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestFind(t *testing.T) {
	byID := map[string]bool{"abc": true, "abd": true, "b": true, "bhidden": false, "chidden": false}
	visible := func(v bool) bool { return v }
	for _, tc := range []struct {
		id   string
		want func(error) bool
	}{
		{"abc", nil}, {"abd", nil}, {"b", nil},
		{"ab", errdefs.IsInvalidArgument}, {"a", errdefs.IsInvalidArgument},
		{"", errdefs.IsNotFound}, {"x", errdefs.IsNotFound}, {"abcd", errdefs.IsNotFound},
		{"c", errdefs.IsNotFound}, {"chidden", errdefs.IsNotFound},
	} {
		found, err := Find(byID, tc.id, "thing", visible)
		if tc.want == nil && (err != nil || !found) || tc.want != nil && !tc.want(err) {
			t.Errorf("%q: %v, %v", tc.id, found, err)
		}
	}
}

func TestNew(t *testing.T) {
	if a, b := New(), New(); len(a) != 64 || a == b {
		t.Errorf("%q, %q", a, b)
	}
}
