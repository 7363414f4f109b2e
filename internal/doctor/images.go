package doctor

import (
	"context"
	"strings"
)

// lookAtImages lists containers' snapshots, and what the image store itself says
// nobody needs.
func (d *Doctor) lookAtImages(ctx context.Context, _ *machineView, _ []string) ([]Finding, error) {
	if d.Images == nil {
		return nil, nil
	}
	keys, err := d.Images.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, key := range keys {
		found = append(found, Finding{
			Kind: Snapshot, Name: key, ID: ownerOf(key),
			Why:    "no record has the ID that it was made for",
			Remedy: "remove it, and the layers that only it needed",
			there:  func() bool { return d.hasSnapshot(ctx, key) },
			repair: func(ctx context.Context) error { return d.Images.RemoveSnapshot(ctx, key) },
		})
	}
	rest, err := d.Images.Leftovers(ctx)
	if err != nil {
		return nil, err
	}
	for _, layer := range rest.Layers {
		found = append(found, Finding{
			Kind: Layer, Name: layer,
			Why:    "no image, no pull and no snapshot needs it",
			Remedy: "remove it",
			repair: d.Images.Collect,
		})
	}
	for _, dir := range rest.Dirs {
		found = append(found, Finding{
			Kind: SnapshotDir, Name: dir,
			Why:    "no snapshot is on record for it",
			Remedy: "remove it",
			there:  exists(dir),
			repair: d.Images.Collect,
		})
	}
	return found, nil
}

// ownerOf is whose snapshot has the key: ID, ID-image-N or infra-ID.
func ownerOf(key string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(key, "infra-"), "-")
	return id
}

// damagedImages are the layers that are not as they were unpacked, and images whose
// records cannot be read.
func (d *Doctor) damagedImages(ctx context.Context) ([]Finding, error) {
	if d.Images == nil {
		return nil, nil
	}
	damaged, err := d.Images.Damages(ctx, d.Contents)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, damage := range damaged {
		f := Finding{
			Kind: BadLayer, Name: damage.Layer, Why: damage.Why.Error(),
			Remedy: "have the next pull bring it again; containers that are in it keep it",
			there:  func() bool { return d.Images.Used(damage) },
			repair: func(ctx context.Context) error { return d.Images.Mend(ctx, damage) },
		}
		images := strings.Join(damage.Images, ", ")
		if damage.Layer == "" {
			f.Kind, f.Name = BadImage, images
		}
		if images != "" {
			f.Remedy = "forget " + images + ", whose next pull brings again what is damaged; containers keep the layers that they are in"
		}
		found = append(found, f)
	}
	return found, nil
}

func (d *Doctor) hasSnapshot(ctx context.Context, key string) bool {
	keys, err := d.Images.Snapshots(ctx)
	for _, k := range keys {
		if k == key {
			return true
		}
	}
	return err != nil
}
