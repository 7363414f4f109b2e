// Package ids makes the IDs of sandboxes and containers, and finds them by prefix.
package ids

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// New returns 256 random bits in hex, as CRI clients know IDs. No ID is ever
// used twice.
func New() string {
	var b [32]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// Find returns the visible entry whose ID is id or, if there is just one, begins
// with it. Errors: errdefs.ErrNotFound, and ErrInvalidArgument for a prefix of
// several IDs; what names the kind.
func Find[T any](byID map[string]T, id, what string, visible func(T) bool) (T, error) {
	if t, ok := byID[id]; ok && visible(t) {
		return t, nil
	}
	var found, none T
	matches := 0
	for full, t := range byID {
		if id != "" && strings.HasPrefix(full, id) && visible(t) {
			found = t
			matches++
		}
	}
	switch matches {
	case 0:
		return none, fmt.Errorf("%s %q: %w", what, id, errdefs.ErrNotFound)
	case 1:
		return found, nil
	default:
		return none, fmt.Errorf("%s ID prefix %q fits %d of them: %w", what, id, matches, errdefs.ErrInvalidArgument)
	}
}
