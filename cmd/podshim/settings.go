package main

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/podshim/podshim/internal/config"
)

// settings reads the configuration file and lets flags override it.
type settings struct {
	path string
}

// A flag overrides one key of the configuration; field points at it (*string or
// *[]string). Its help is the key's own documentation.
type flag struct {
	name, key string
	field     func(*config.Config) any
}

var flags = []flag{
	{"root", "root", func(c *config.Config) any { return &c.Root }},
	{"run", "run", func(c *config.Config) any { return &c.Run }},
	{"socket", "cri.socket", func(c *config.Config) any { return &c.CRI.Socket }},
	{"log-level", "log.level", func(c *config.Config) any { return &c.Log.Level }},
	{"log-format", "log.format", func(c *config.Config) any { return &c.Log.Format }},
	{"monitor", "monitor.binary", func(c *config.Config) any { return &c.Monitor.Binary }},
	{"cgroup-driver", "cgroup.driver", func(c *config.Config) any { return &c.Cgroup.Driver }},
	{"cgroup-parent", "cgroup.parent", func(c *config.Config) any { return &c.Cgroup.Parent }},
	{"cni-conf-dir", "network.conf_dir", func(c *config.Config) any { return &c.Network.ConfDir }},
	{"cni-bin-dir", "network.bin_dirs", func(c *config.Config) any { return &c.Network.BinDirs }},
	{"certs-dir", "image.certs_dirs", func(c *config.Config) any { return &c.Image.CertsDirs }},
}

// register adds the flags to fs.
func (s *settings) register(fs *pflag.FlagSet) {
	fs.StringVar(&s.path, "config", config.DefaultPath, "configuration file; may be absent unless named here")
	for _, f := range flags {
		key, ok := config.Doc(f.key)
		if !ok {
			panic("flag --" + f.name + " overrides a key that is not: " + f.key)
		}
		usage := fmt.Sprintf("%s: %s (default %s)", key.Name, strings.TrimSuffix(firstSentence(key.Doc), "."), key.Default)
		switch f.field(new(config.Config)).(type) {
		case *string:
			fs.String(f.name, "", usage)
		case *[]string:
			fs.StringSlice(f.name, nil, usage+"; may be repeated")
		}
	}
}

func firstSentence(doc string) string {
	if i := strings.Index(doc, ". "); i >= 0 {
		return doc[:i]
	}
	return doc
}

// load returns the completed configuration that the file and fs ask for.
func (s *settings) load(fs *pflag.FlagSet) (*config.Config, error) {
	cfg, err := config.Load(s.path, fs.Changed("config"))
	if err != nil {
		return nil, err
	}
	for _, f := range flags {
		if !fs.Changed(f.name) {
			continue
		}
		switch field := f.field(cfg).(type) {
		case *string:
			*field, err = fs.GetString(f.name)
		case *[]string:
			*field, err = fs.GetStringSlice(f.name)
		}
		if err != nil {
			return nil, fmt.Errorf("flag --%s: %w", f.name, err)
		}
	}
	if err := cfg.Complete(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return cfg, nil
}
