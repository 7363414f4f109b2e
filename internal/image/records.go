package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// record is an image as it is kept in images.db:
//
//	images/<image ID>/record    this struct as JSON
//	images/<image ID>/config    the image's config, byte for byte
//	images/<image ID>/manifest  the manifest it was pulled by, byte for byte
//
// One transaction writes all three, so an image is there whole or not at all.
// A published record is read without a lock and therefore never changed.
type record struct {
	ID          string        `json:"id"`
	RepoTags    []string      `json:"repo_tags,omitempty"`
	RepoDigests []string      `json:"repo_digests,omitempty"`
	Size        int64         `json:"size"`
	ChainID     digest.Digest `json:"chain_id,omitempty"`
	PulledAt    time.Time     `json:"pulled_at"`
	// Unsynced is the boot ID of the machine that pulled the image, as long as its
	// layers may not all be on disk.
	Unsynced string `json:"unsynced,omitempty"`

	config ocispec.ImageConfig // decoded from the config's bytes
}

func (r *record) names() []string { return append(slices.Clone(r.RepoTags), r.RepoDigests...) }

// without returns a copy that lacks a name.
func (r *record) without(name string) *record {
	c := *r
	c.RepoTags = slices.DeleteFunc(slices.Clone(r.RepoTags), func(n string) bool { return n == name })
	c.RepoDigests = slices.DeleteFunc(slices.Clone(r.RepoDigests), func(n string) bool { return n == name })
	return &c
}

// merge adds names, sorted and each once.
func merge(names []string, more ...string) []string {
	all := append(slices.Clone(names), more...)
	slices.Sort(all)
	return slices.DeleteFunc(slices.Compact(all), func(n string) bool { return n == "" })
}

var (
	bucketImages = []byte("images")
	keyRecord    = []byte("record")
	keyConfig    = []byte("config")
	keyManifest  = []byte("manifest")
)

// records is the durable half of the store's knowledge.
type records struct{ db *bolt.DB }

// openTimeout is how long Open waits for another process to let go of the store.
const openTimeout = 2 * time.Second

func openRecords(path string) (*records, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: openTimeout, NoStatistics: true})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("open %s: another process uses it: %w", path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketImages)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare %s: %w", path, err), db.Close())
	}
	return &records{db: db}, nil
}

func (r *records) close() error { return r.db.Close() }

// load returns all records that are whole, and for each other one why it is not.
func (r *records) load() (whole []*record, broken map[string]error, err error) {
	broken = map[string]error{}
	err = r.db.View(func(tx *bolt.Tx) error {
		images := tx.Bucket(bucketImages)
		return images.ForEachBucket(func(id []byte) error {
			rec, err := decode(string(id), images.Bucket(id))
			if err != nil {
				broken[string(id)] = err
				return nil
			}
			whole = append(whole, rec)
			return nil
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read image records: %w", err)
	}
	return whole, broken, nil
}

func decode(id string, b *bolt.Bucket) (*record, error) {
	rec := &record{}
	if err := json.Unmarshal(b.Get(keyRecord), rec); err != nil {
		return nil, fmt.Errorf("decode record: %w", err)
	}
	config := b.Get(keyConfig)
	if got := digest.FromBytes(config).String(); rec.ID != id || got != id {
		return nil, fmt.Errorf("config has digest %s: %w", got, errdefs.ErrDataLoss)
	}
	parsed, err := parseConfig(config)
	if err != nil {
		return nil, err
	}
	rec.config = parsed.Config
	return rec, nil
}

// put writes rec with its blobs and, in the same transaction, the records that
// lose a name to it.
func (r *records) put(rec *record, config, manifest []byte, changed ...*record) error {
	err := r.db.Update(func(tx *bolt.Tx) error {
		images := tx.Bucket(bucketImages)
		b, err := images.CreateBucketIfNotExists([]byte(rec.ID))
		if err != nil {
			return err
		}
		for _, c := range changed {
			if err := putRecord(images.Bucket([]byte(c.ID)), c); err != nil {
				return err
			}
		}
		return errors.Join(putRecord(b, rec), b.Put(keyConfig, config), b.Put(keyManifest, manifest))
	})
	if err != nil {
		return fmt.Errorf("write image record: %w", err)
	}
	return nil
}

// update writes records that are there, and leaves their blobs as they are.
func (r *records) update(recs ...*record) error {
	err := r.db.Update(func(tx *bolt.Tx) error {
		for _, rec := range recs {
			if err := putRecord(tx.Bucket(bucketImages).Bucket([]byte(rec.ID)), rec); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write image record: %w", err)
	}
	return nil
}

func putRecord(b *bolt.Bucket, rec *record) error {
	if b == nil {
		return fmt.Errorf("record %s: %w", rec.ID, errdefs.ErrNotFound)
	}
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return b.Put(keyRecord, data)
}

// remove forgets images; those that are gone already are fine.
func (r *records) remove(ids ...string) error {
	if len(ids) == 0 {
		return nil
	}
	err := r.db.Update(func(tx *bolt.Tx) error {
		for _, id := range ids {
			err := tx.Bucket(bucketImages).DeleteBucket([]byte(id))
			if err != nil && !errors.Is(err, berrors.ErrBucketNotFound) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove image record: %w", err)
	}
	return nil
}

// blob returns a copy of an image's config or manifest.
func (r *records) blob(id string, key []byte) (data []byte, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketImages).Bucket([]byte(id))
		if b == nil {
			return fmt.Errorf("image %s: %w", id, errdefs.ErrNotFound)
		}
		data = slices.Clone(b.Get(key))
		return nil
	})
	return data, err
}

// size is what the database takes on disk, bytes.
func (r *records) size() int64 {
	st, err := os.Stat(r.db.Path())
	if err != nil {
		return 0
	}
	return st.Size()
}
