package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// Remove removes the image that ref names, under all its names, and the layers
// that nothing else needs. Layers under a container's snapshot stay until
// RemoveSnapshot. An unknown image is success; errdefs.ErrInvalidArgument when ref
// is no reference or not unique.
func (s *Store) Remove(ctx context.Context, ref string) error {
	s.freeing.RLock()
	removed, err := s.removeRecord(ref)
	if err == nil && removed {
		return s.collectHeld(s.quiet(context.WithoutCancel(ctx))) // the image is gone: its layers follow
	}
	s.freeing.RUnlock()
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (s *Store) removeRecord(ref string) (bool, error) {
	s.publish.Lock()
	defer s.publish.Unlock()
	rec, err := s.index.find(ref)
	if err != nil {
		return false, err
	}
	if err := s.records.remove(rec.ID); err != nil {
		return false, fmt.Errorf("remove image %s: %w", rec.ID, err)
	}
	s.index.remove(rec.ID)
	return true, nil
}
