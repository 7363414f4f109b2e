package doctor

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/boot"
	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/state"
)

// ConfigOf is what to look at for a podshim with a completed configuration, who
// looks left out.
func ConfigOf(cfg *config.Config) Config {
	return Config{
		Run: cfg.Run, Root: cfg.Root, NetnsDir: cfg.Network.NetnsDir,
		CgroupParent: cfg.Cgroup.Parent, SystemdCgroup: cfg.Cgroup.Driver == host.DriverSystemd,
		CNI: cni.Config{
			ConfDir:       cfg.Network.ConfDir,
			ConfTemplate:  cfg.Network.ConfTemplate,
			BinDirs:       cfg.Network.BinDirs,
			CacheDir:      filepath.Join(cfg.Root, "cni"),
			PluginTimeout: cfg.Network.PluginTimeout.Std(),
			IdlePlugins:   cfg.Network.IdlePlugins,
			IdleIPv6:      cfg.Network.IdleIPv6,
		},
	}
}

// Alone examines what a podshim that does not run has left. It reads the files of
// all parts and changes nothing; the caller sees to it that none starts meanwhile.
// contents is Config.Contents.
func Alone(ctx context.Context, cfg *config.Config, contents bool) ([]Finding, error) {
	books, err := readBooks(cfg)
	if err != nil {
		return nil, err
	}
	log := logrus.New()
	log.SetOutput(io.Discard) // what there is to say is found
	images, err := image.Inspect(image.Config{Root: filepath.Join(cfg.Root, "images"), Log: logrus.NewEntry(log)})
	if err != nil {
		books.damaged = append(books.damaged, state.Damage{Path: filepath.Join(cfg.Root, "images"), Err: err})
	}
	conf := ConfigOf(cfg)
	conf.Books, conf.Images, conf.Contents = books, images, contents
	found, err := New(conf).Examine(ctx)
	if images != nil {
		err = errors.Join(err, images.Close())
	}
	return found, err
}

// books are the records of a podshim that does not run.
type books struct {
	sandboxes  []*sandbox.Record
	containers []*container.Record
	damaged    []state.Damage
	monitored  map[string]bool
}

func (b *books) Sandboxes() []*sandbox.Record    { return b.sandboxes }
func (b *books) Containers() []*container.Record { return b.containers }
func (b *books) Damaged() []state.Damage         { return b.damaged }
func (b *books) Monitored() map[string]bool      { return b.monitored }

func readBooks(cfg *config.Config) (*books, error) {
	database := filepath.Join(cfg.Root, "state.db")
	last, err := boot.Read(filepath.Join(cfg.Root, "boot"))
	if err != nil {
		return nil, err
	}
	all, damaged, err := state.Inspect(state.Config{Database: database, RunDir: filepath.Join(cfg.Run, "state"), Boot: last})
	if err != nil {
		return nil, err
	}
	b := &books{damaged: damaged, monitored: map[string]bool{}}
	for id, raw := range all[state.Sandboxes] {
		r, err := sandbox.Decode(raw)
		if err != nil {
			b.damaged = append(b.damaged, state.Damage{Kind: state.Sandboxes, ID: id, Err: err})
			continue
		}
		b.sandboxes = append(b.sandboxes, r)
	}
	for id, raw := range all[state.Containers] {
		r, err := container.Decode(raw)
		if err != nil {
			b.damaged = append(b.damaged, state.Damage{Kind: state.Containers, ID: id, Err: err})
			continue
		}
		b.containers = append(b.containers, r)
	}
	// podmon's own files tell what it holds, or would take up.
	entries, err := os.ReadDir(filepath.Join(cfg.Run, "monitor", "containers"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		b.monitored[e.Name()] = true
	}
	return b, nil
}
