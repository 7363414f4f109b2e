package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stagedLayers stages n layers that stand on each other.
func stagedLayers(t *testing.T, s *Store, n int) []*staged {
	t.Helper()
	var diffIDs []digest.Digest
	var batch []*staged
	for i := range n {
		data := archiveOf(t, file("f", string(rune('a'+i))))
		l := layer{diffID: digest.FromBytes(data), desc: ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}}
		l.parent = identity.ChainID(diffIDs)
		diffIDs = append(diffIDs, l.diffID)
		l.chain = identity.ChainID(append([]digest.Digest(nil), diffIDs...))
		st, err := s.stage(context.Background(), l, bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		batch = append(batch, st)
	}
	return batch
}

func TestBatchIsCommittedWholeOrNotAtAll(t *testing.T) {
	ctx := context.Background()
	s := openStore(t)
	batch := stagedLayers(t, s, 3)
	good := batch[2].layer.parent
	batch[2].layer.parent = digest.FromString("no such layer")
	if err := s.commitBatch(ctx, batch); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	for _, st := range batch {
		if err := errors.Join(st.drop(), st.drop()); err != nil {
			t.Error(err)
		}
	}
	assertSnapshots(t, s, 0)

	batch = stagedLayers(t, s, 3)
	if batch[2].layer.parent != good {
		t.Fatal("test stages other layers")
	}
	if err := s.commitBatch(ctx, batch); err != nil {
		t.Fatal(err)
	}
	assertSnapshots(t, s, 3)
	if err := s.collect(ctx); err != nil {
		t.Error(err)
	}
	assertSnapshots(t, s, 0)
}

// A layer whose commit was rolled back has lost its number, and another snapshot may
// have got it by the time that the files are removed.
func TestRolledBackLayersLeaveOthersAlone(t *testing.T) {
	ctx := context.Background()
	s := openStore(t)
	batch := stagedLayers(t, s, 1)
	if err := s.commitBatch(ctx, batch); err != nil {
		t.Fatal(err)
	}
	dirs, err := s.chainDirs(ctx, batch[0].layer.chain.String())
	if err != nil {
		t.Fatal(err)
	}
	taken, free := filepath.Dir(dirs[0]), s.snapshotDir("99")
	if err := os.MkdirAll(filepath.Join(free, "fs"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.discardMoved(ctx, []string{taken, free})
	if _, err := os.Stat(filepath.Join(taken, "fs", "f")); err != nil {
		t.Errorf("a committed layer's file: %v", err)
	}
	if _, err := os.Stat(free); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the rolled back layer's directory is there still: %v", err)
	}
}

func TestCommitterTakesLayersInAnyOrder(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := openStore(t)
	batch := stagedLayers(t, s, 6)
	c := newCommitter(ctx, s)
	defer c.stop()
	var wg sync.WaitGroup
	for i := len(batch) - 1; i >= 0; i-- {
		wg.Go(func() {
			if err := c.commit(ctx, i, batch[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	assertSnapshots(t, s, 6)
}

func TestCommitterGivesUpWithItsPull(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s := openStore(t)
	batch := stagedLayers(t, s, 2)
	c := newCommitter(ctx, s)
	got := make(chan error, 1)
	go func() { got <- c.commit(ctx, 1, batch[1]) }() // layer 0 never comes
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	for _, st := range batch {
		if err := st.drop(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(batch[1].dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	assertSnapshots(t, s, 0)
}

func FuzzParseDocument(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:aa","size":1}]}`))
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[]}`))
	f.Add([]byte(`{"config":{"digest":"x","size":-1},"layers":[{}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := parseDocument(data)
		if err == nil && !d.isIndex() && d.Config == nil {
			t.Error("no config")
		}
		if err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("class of %v", err)
		}
	})
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "x@sha256:" + digest.FromString("").Encoded(), "[::1]:5000/x", "sha256:ab"} {
		f.Add(s)
	}
	x, err := newIndex(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		if _, err := x.find(ref); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", ref, err)
		}
	})
}
