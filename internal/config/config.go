// Package config is podshim's configuration: where it comes from, what it means
// and what it may say.
//
// default.toml in this package is the one description of every key: it is what
// `podshim config default` prints, what [Default] is decoded from, what --help
// quotes and what docs/config.md is rendered from.
//
// A Config is made in three steps. [Load] decodes a file over the defaults and
// refuses unknown keys and wrong types with file, line and column. The caller
// may then change fields (command line flags). [Config.Complete] fills in what
// depends on other keys and checks every value; its errors name the key. Only a
// completed Config is handed to the parts of the daemon.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// DefaultPath is where podshim looks for its configuration file.
const DefaultPath = "/etc/podshim/config.toml"

//go:embed default.toml
var defaultFile []byte

// Config is the whole configuration. The meaning of each key is in default.toml.
type Config struct {
	Root    string  `toml:"root"`
	Run     string  `toml:"run"`
	Log     Log     `toml:"log"`
	CRI     CRI     `toml:"cri"`
	Metrics Metrics `toml:"metrics"`
	Monitor Monitor `toml:"monitor"`
	Cgroup  Cgroup  `toml:"cgroup"`
	Network Network `toml:"network"`
	Image   Image   `toml:"image"`
	Runtime Runtime `toml:"runtime"`
}

// Log is the table [log].
type Log struct {
	Level  string `toml:"level"`
	Format string `toml:"format"`
}

// CRI is the table [cri].
type CRI struct {
	// Socket is absolute once the Config is complete.
	Socket              string   `toml:"socket"`
	SocketGroup         string   `toml:"socket_group"`
	StreamAddress       string   `toml:"stream_address"`
	StreamPort          int      `toml:"stream_port"`
	StreamIdleTimeout   Duration `toml:"stream_idle_timeout"`
	MaxMessageSize      int      `toml:"max_message_size"`       // bytes
	ExecSyncOutputLimit int      `toml:"exec_sync_output_limit"` // bytes
}

// Metrics is the table [metrics].
type Metrics struct {
	Address string `toml:"address"`
}

// Monitor is the table [monitor].
type Monitor struct {
	// Binary is what the file says; [Config.MonitorBinary] finds the executable.
	Binary string `toml:"binary"`
}

// Cgroup is the table [cgroup].
type Cgroup struct {
	// Driver is DriverCgroupfs or DriverSystemd once the Config is complete.
	Driver string `toml:"driver"`
	// Parent is never empty once the Config is complete.
	Parent string `toml:"parent"`
}

// Network is the table [network].
type Network struct {
	ConfDir       string   `toml:"conf_dir"`
	ConfTemplate  string   `toml:"conf_template"`
	BinDirs       []string `toml:"bin_dirs"`
	NetnsDir      string   `toml:"netns_dir"`
	PluginTimeout Duration `toml:"plugin_timeout"`
	IdlePlugins   bool     `toml:"idle_plugins"`
	IdleIPv6      bool     `toml:"idle_ipv6"`
}

// Image is the table [image].
type Image struct {
	CertsDirs              []string `toml:"certs_dirs"`
	InfraImage             string   `toml:"infra_image"`
	Pinned                 []string `toml:"pinned"`
	MaxConcurrentDownloads int      `toml:"max_concurrent_downloads"`
	PullProgressTimeout    Duration `toml:"pull_progress_timeout"`
}

// Runtime is the table [runtime]. Its own values are those of the handler "";
// [Runtime.Handler] gives the values that hold for a named one.
type Runtime struct {
	DefaultHandler               string             `toml:"default_handler"`
	NofileSoft                   uint64             `toml:"nofile_soft"`
	NofileHard                   uint64             `toml:"nofile_hard"`
	PidsLimit                    int64              `toml:"pids_limit"`
	DefaultCapabilities          []string           `toml:"default_capabilities"`
	SeccompProfile               string             `toml:"seccomp_profile"`
	PrivilegedWithoutHostDevices bool               `toml:"privileged_without_host_devices"`
	Handlers                     map[string]Handler `toml:"handlers,omitempty"`
}

// Handler is one table [runtime.handlers.NAME]. A nil field is one the file does
// not set: the value of [runtime] holds.
type Handler struct {
	NofileSoft                   *uint64   `toml:"nofile_soft,omitempty"`
	NofileHard                   *uint64   `toml:"nofile_hard,omitempty"`
	PidsLimit                    *int64    `toml:"pids_limit,omitempty"`
	DefaultCapabilities          *[]string `toml:"default_capabilities,omitempty"`
	SeccompProfile               *string   `toml:"seccomp_profile,omitempty"`
	PrivilegedWithoutHostDevices *bool     `toml:"privileged_without_host_devices,omitempty"`
}

// Default returns the configuration of default.toml, not completed.
func Default() *Config {
	cfg := new(Config)
	if err := decode("default.toml", defaultFile, cfg); err != nil {
		panic(err) // built in; a test decodes it
	}
	return cfg
}

// DefaultFile returns the commented file that holds every key with its default.
func DefaultFile() []byte { return bytes.Clone(defaultFile) }

// Load decodes the file at path over the defaults. Without a file at path the
// defaults are returned, unless required is set.
//
// A file podshim cannot understand in full is refused; the error has one line
// "path:line:column: what" for each key it does not know.
func Load(path string, required bool) (*Config, error) {
	cfg := Default()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return cfg, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if err := decode(path, data, cfg); err != nil {
		return nil, err
	}
	return cfg, nil
}

// decode reads data, which came from the file called name, into cfg.
func decode(name string, data []byte, cfg *Config) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(cfg)
	if err == nil {
		return nil
	}
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		errs := make([]error, len(unknown.Errors))
		for i := range unknown.Errors {
			errs[i] = unknownKey(name, &unknown.Errors[i])
		}
		return errors.Join(errs...)
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		row, col := wrong.Position()
		// The library names Go's fields and types, which are nobody's business.
		what, _, _ := strings.Cut(strings.TrimPrefix(wrong.Error(), "toml: "), " into struct field ")
		if kind, ok := strings.CutPrefix(what, "cannot decode TOML "); ok {
			what = "wrong type: " + kind + "; `podshim config default` shows the right one"
		}
		return fmt.Errorf("%s:%d:%d: %s%s", name, row, col, keyPrefix(wrong.Key()), what)
	}
	return fmt.Errorf("%s: %w", name, err)
}

func unknownKey(name string, e *toml.DecodeError) error {
	row, col := e.Position()
	return fmt.Errorf("%s:%d:%d: unknown key %s", name, row, col, strings.Join(e.Key(), "."))
}

func keyPrefix(key toml.Key) string {
	if len(key) == 0 {
		return ""
	}
	return strings.Join(key, ".") + ": "
}

// TOML returns the configuration as a file that Load reads back to the same
// values.
func (c *Config) TOML() ([]byte, error) {
	var buf bytes.Buffer
	enc := toml.NewEncoder(&buf)
	enc.SetIndentTables(false)
	if err := enc.Encode(c); err != nil {
		return nil, fmt.Errorf("encode configuration: %w", err)
	}
	return buf.Bytes(), nil
}

// Resolved is what holds for the pods of one handler.
type Resolved struct {
	Name                         string
	NofileSoft, NofileHard       uint64
	PidsLimit                    int64
	DefaultCapabilities          []string
	SeccompProfile               string
	PrivilegedWithoutHostDevices bool
}

// Handler returns what holds for pods of the handler called name; "" is the
// handler for pods that name none, which is DefaultHandler. It reports false
// when there is no such handler.
func (r Runtime) Handler(name string) (Resolved, bool) {
	if name == "" {
		name = r.DefaultHandler
	}
	out := Resolved{
		Name:                         name,
		NofileSoft:                   r.NofileSoft,
		NofileHard:                   r.NofileHard,
		PidsLimit:                    r.PidsLimit,
		DefaultCapabilities:          r.DefaultCapabilities,
		SeccompProfile:               r.SeccompProfile,
		PrivilegedWithoutHostDevices: r.PrivilegedWithoutHostDevices,
	}
	if name == "" {
		return out, true
	}
	h, ok := r.Handlers[name]
	if !ok {
		return Resolved{}, false
	}
	override(&out.NofileSoft, h.NofileSoft)
	override(&out.NofileHard, h.NofileHard)
	override(&out.PidsLimit, h.PidsLimit)
	override(&out.DefaultCapabilities, h.DefaultCapabilities)
	override(&out.SeccompProfile, h.SeccompProfile)
	override(&out.PrivilegedWithoutHostDevices, h.PrivilegedWithoutHostDevices)
	return out, true
}

func override[T any](dst, src *T) {
	if src != nil {
		*dst = *src
	}
}

// Duration is a time.Duration that is written as a string ("90s") in TOML. It is
// a struct because a bare number must be a wrong type, not nanoseconds.
type Duration struct{ d time.Duration }

// Std returns d as the standard library's type.
func (d Duration) Std() time.Duration { return d.d }

// String writes d as time.Duration does.
func (d Duration) String() string { return d.d.String() }

// MarshalText writes d for TOML.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what [time.ParseDuration] reads.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a time such as \"90s\" or \"5m\"", text)
	}
	d.d = v
	return nil
}
