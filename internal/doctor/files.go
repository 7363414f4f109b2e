package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/podshim/podshim/internal/image"
)

// lookAtFiles lists pods' and containers' directories, what is mounted in them,
// and what podmon has on file.
func (d *Doctor) lookAtFiles(_ context.Context, m *machineView, _ []string) ([]Finding, error) {
	var found []Finding
	for _, dir := range d.homes() {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if filepath.Base(dir) == "infra" && anyID.FindString(e.Name()) == "" {
				continue // the embedded infra's root
			}
			found = append(found, Finding{
				Kind: Directory, Name: path, ID: e.Name(),
				Why:    "no record has its ID",
				Remedy: "remove it",
				there:  exists(path),
				repair: func(context.Context) error { return d.removeDir(path) },
			})
		}
	}
	for _, mount := range slices.Backward(m.mounts) { // the inner ones first
		point := mount.Mountpoint
		for _, dir := range d.homes() {
			within, ok := strings.CutPrefix(point, dir+"/")
			if !ok {
				continue
			}
			id, _, _ := strings.Cut(within, "/")
			if id == "rootfs" {
				continue // the embedded infra's
			}
			found = append(found, Finding{
				Kind: Mount, Name: point, ID: id,
				Why:    fmt.Sprintf("no record has the ID that its directory is named for (%s)", mount.FSType),
				Remedy: "unmount it",
				there:  func() bool { return isMounted(point) },
				repair: func(context.Context) error { return image.Unmount(point) },
			})
		}
	}
	more, err := d.lookAtMonitor()
	return append(found, more...), err
}

// homes are the directories that hold one for each pod or container.
func (d *Doctor) homes() []string {
	return []string{
		filepath.Join(d.Run, "sandboxes"), filepath.Join(d.Root, "sandboxes"),
		filepath.Join(d.Run, "containers"), filepath.Join(d.Root, "containers"),
		filepath.Join(d.Run, "infra"),
	}
}

// removeDir removes a directory, unless something is mounted below: that would be
// emptied.
func (d *Doctor) removeDir(path string) error {
	mounts, err := mountsBelow(path)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%s is mounted still", mounts[0])
	}
	return os.RemoveAll(path)
}

// lookAtMonitor lists the containers that podmon holds or has on file.
func (d *Doctor) lookAtMonitor() ([]Finding, error) {
	where := make(map[string]string)
	for _, dir := range []string{"containers", "state"} {
		dir = filepath.Join(d.Run, "monitor", dir)
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if where[e.Name()] == "" {
				where[e.Name()] = "podmon has it on file in " + dir + ", and no record has its ID"
			}
		}
	}
	for id := range d.Books.Monitored() {
		if where[id] == "" {
			where[id] = "podmon holds it, and no record has its ID"
		}
	}
	var found []Finding
	for id, why := range where {
		found = append(found, Finding{
			Kind: Monitored, Name: id, ID: id, Why: why,
			Remedy: "kill it and have podmon remove what it has of it",
			there: func() bool {
				return d.Books.Monitored()[id] || exists(filepath.Join(d.Run, "monitor", "containers", id))() ||
					exists(filepath.Join(d.Run, "monitor", "state", id))()
			},
			repair: func(ctx context.Context) error { return d.Hands.Delete(ctx, id) },
		})
	}
	return found, nil
}
