package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// maxConf bounds one configuration file, bytes.
const maxConf = 1 << 20

// loaded is one look at the configuration directory. It is never changed once
// made.
type loaded struct {
	list  *libcni.NetworkConfigList // nil with err
	file  string                    // list's file
	files []FileInfo
	err   error // why there is no network
	at    time.Time
}

// FileInfo is one file of the configuration directory, as [Network.Info] tells.
type FileInfo struct {
	Path string `json:"path"`
	// Network is the network's name, empty when the file was not read or is bad.
	Network string `json:"network,omitempty"`
	// Error says what is wrong with the file.
	Error string `json:"error,omitempty"`
}

// load reads the directory: files ending in .conflist, .conf or .json in
// lexical order. The first one is the network of all pods, or the first one of
// that name when one is configured. A first file that cannot be read is an
// error, not a reason to take the next: pods must not land in another network
// because of a typing error.
func load(cfg Config, r *runner) *loaded {
	l := &loaded{at: time.Now()}
	paths, err := confFiles(cfg.ConfDir)
	if err != nil {
		l.err = fmt.Errorf("read CNI configuration directory: %w", err)
		return l
	}
	if len(paths) == 0 {
		l.err = fmt.Errorf("no CNI configuration in %s: install a network (a .conflist file)", cfg.ConfDir)
		return l
	}
	for _, path := range paths {
		l.consider(path, cfg)
	}
	switch {
	case l.list != nil:
		l.err = findPlugins(l.list, cfg.BinDirs, r)
	case l.err == nil:
		l.err = fmt.Errorf("no CNI configuration in %s has the network %q", cfg.ConfDir, cfg.Network)
	}
	if l.err != nil && l.list != nil {
		l.err = fmt.Errorf("network %q (%s): %w", l.list.Name, l.file, l.err)
	}
	return l
}

// consider reads one file if the network is not settled yet.
func (l *loaded) consider(path string, cfg Config) {
	info := FileInfo{Path: path}
	defer func() { l.files = append(l.files, info) }()
	settled := l.list != nil || (l.err != nil && cfg.Network == "")
	if settled {
		return
	}
	list, err := readConf(path)
	if err != nil {
		err = fmt.Errorf("CNI configuration %s: %w", path, err)
		info.Error = err.Error()
		if cfg.Network == "" {
			l.err = err
		}
		return
	}
	info.Network = list.Name
	if cfg.Network == "" || list.Name == cfg.Network {
		l.list, l.file = list, path
	}
}

func confFiles(dir string) ([]string, error) {
	paths, err := libcni.ConfFiles(dir, []string{".conflist", ".conf", ".json"})
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	slices.Sort(paths)
	return paths, err
}

// readConf reads a list of plugins, or one plugin as a list of one.
func readConf(path string) (*libcni.NetworkConfigList, error) {
	raw, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	if filepath.Ext(path) != ".conflist" {
		if raw, err = asList(raw); err != nil {
			return nil, err
		}
	}
	list, err := parseList(raw)
	if err != nil {
		return nil, err
	}
	if !list.LoadOnlyInlinedPlugins {
		// A plugin may drop its part into DIR/NETWORK/*.conf (CNI 1.1).
		more, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(path), list.Name)
		if err != nil {
			return nil, err
		}
		list.Plugins = append(list.Plugins, more...)
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("it lists no plugins")
	}
	return list, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("not a regular file"))
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err == nil && len(raw) > maxConf {
		err = fmt.Errorf("larger than %d bytes", maxConf)
	}
	return raw, err
}

// asList turns a single plugin's configuration, the format before CNI 0.3, into
// a list of one.
func asList(raw []byte) ([]byte, error) {
	conf, err := libcni.NetworkPluginConfFromBytes(raw)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"name":       conf.Network.Name,
		"cniVersion": conf.Network.CNIVersion,
		"plugins":    []json.RawMessage{raw},
	})
}

func parseList(raw []byte) (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil {
		return nil, err
	}
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return nil, fmt.Errorf("name %q: %w", list.Name, err)
	}
	newer, err := version.GreaterThan(list.CNIVersion, version.Current())
	if err != nil {
		return nil, fmt.Errorf("cniVersion: %w", err)
	}
	if newer {
		return nil, fmt.Errorf("cniVersion %s is newer than this runtime's %s", list.CNIVersion, version.Current())
	}
	return list, nil
}

// freeze writes a list down with all its plugins, those from other files too,
// so that DEL can be run years after the configuration has changed.
func freeze(list *libcni.NetworkConfigList) (json.RawMessage, error) {
	plugins := make([]json.RawMessage, 0, len(list.Plugins))
	for _, p := range list.Plugins {
		plugins = append(plugins, p.Bytes)
	}
	return json.Marshal(map[string]any{
		"name":                   list.Name,
		"cniVersion":             list.CNIVersion,
		"disableCheck":           list.DisableCheck,
		"disableGC":              list.DisableGC,
		"loadOnlyInlinedPlugins": true,
		"plugins":                plugins,
	})
}

// findPlugins looks for each plugin's executable, those of the IPAM too.
func findPlugins(list *libcni.NetworkConfigList, dirs []string, r *runner) error {
	for _, p := range list.Plugins {
		for _, plugin := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if plugin == "" {
				continue
			}
			if _, err := r.FindInPath(plugin, dirs); err != nil {
				return err
			}
		}
	}
	return nil
}

// signature changes when something in the directories changes that load looks
// at. It costs a stat of each configuration file, and is how changes are noticed
// that no notification tells (a directory's parent was replaced, a network
// filesystem, no inotify watches left).
func signature(cfg Config) string {
	var b strings.Builder
	stampTree(&b, cfg.ConfDir)
	for _, dir := range cfg.BinDirs {
		stamp(&b, dir)
	}
	return b.String()
}

// stampTree stamps a directory, its configuration files, and those one level
// below (DIR/NETWORK/*.conf).
func stampTree(b *strings.Builder, dir string) {
	stamp(b, dir)
	for _, pattern := range []string{"*.conf*", "*.json", "*/*.conf"} {
		paths, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, p := range paths {
			stamp(b, p)
		}
	}
}

func stamp(b *strings.Builder, path string) {
	st, err := os.Stat(path)
	if err != nil {
		fmt.Fprintln(b, path, "none")
		return
	}
	ino := st.Sys().(*syscall.Stat_t).Ino
	fmt.Fprintln(b, path, ino, st.Size(), st.ModTime().UnixNano(), st.Mode())
}
