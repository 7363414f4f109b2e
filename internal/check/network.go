package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/config"
)

const noNetwork = "podshim starts, but is NetworkReady=false: only pods on the host's network run"

func network(_ context.Context, cfg *config.Config) []Finding {
	info, err := loadedNetwork(cfg)
	if err != nil {
		return []Finding{warning("CNI configuration", err.Error(), noNetwork, "")}
	}
	return append(judgeNetwork(info, cfg.Network.BinDirs), forwarding("/proc/sys/net"))
}

// loadedNetwork asks the part of podshim that picks the network which it picks.
func loadedNetwork(cfg *config.Config) (cni.Info, error) {
	cache, err := os.MkdirTemp("", "podshim-check-")
	if err != nil {
		return cni.Info{}, err
	}
	defer os.RemoveAll(cache)
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	n, err := cni.New(cni.Config{
		ConfDir: cfg.Network.ConfDir, BinDirs: cfg.Network.BinDirs, CacheDir: cache,
		PluginTimeout: cfg.Network.PluginTimeout.Std(), Log: logrus.NewEntry(silent),
	})
	if err != nil {
		return cni.Info{}, err
	}
	defer n.Close()
	return n.Info(), nil
}

func judgeNetwork(info cni.Info, binDirs []string) []Finding {
	if info.File == "" {
		return []Finding{warning("CNI configuration", info.Error, noNetwork,
			"install a network, or see docs/install.md for a bridge on one machine")}
	}
	findings := []Finding{ok("CNI configuration", "%s: network %s (%s)", info.File, info.Network, strings.Join(info.Plugins, ", "))}
	types, err := pluginTypes(info.File)
	if err != nil {
		return append(findings, warning("CNI plugins", err.Error(), noNetwork, ""))
	}
	for _, t := range info.Plugins { // those that other files add to the list
		if !slices.Contains(types, t) {
			types = append(types, t)
		}
	}
	findings = append(findings, plugins(types, binDirs))
	if slices.Contains(types, "portmap") {
		findings = append(findings, firewall(exec.LookPath))
	}
	return findings
}

// pluginTypes lists the plugins a configuration file names, those for addresses
// too.
func pluginTypes(file string) ([]string, error) {
	type plugin struct {
		Type string `json:"type"`
		IPAM struct {
			Type string `json:"type"`
		} `json:"ipam"`
	}
	var list struct {
		plugin
		Plugins []plugin `json:"plugins"`
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var types []string
	for _, p := range append(list.Plugins, list.plugin) {
		for _, t := range []string{p.Type, p.IPAM.Type} {
			if t != "" && !slices.Contains(types, t) {
				types = append(types, t)
			}
		}
	}
	return types, nil
}

func plugins(types, dirs []string) Finding {
	var missing []string
	for _, t := range types {
		found := slices.ContainsFunc(dirs, func(dir string) bool {
			fi, err := os.Stat(filepath.Join(dir, t))
			return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
		})
		if !found {
			missing = append(missing, t)
		}
	}
	if len(missing) > 0 {
		return warning("CNI plugins", fmt.Sprintf("missing in %s: %s", strings.Join(dirs, ", "), strings.Join(missing, ", ")),
			noNetwork, "install the plugins (Debian: containernetworking-plugins), or set network.bin_dirs")
	}
	return ok("CNI plugins", "%s", strings.Join(types, ", "))
}

// firewall looks for a program that portmap works by.
func firewall(lookPath func(string) (string, error)) Finding {
	for _, name := range []string{"iptables", "nft"} {
		if path, err := lookPath(name); err == nil {
			return ok("portmap", "%s", path)
		}
	}
	return warning("portmap", "neither iptables nor nft is in PATH", "pods with a hostPort fail to start", "install iptables")
}

// forwarding reads the sysctls in dir (/proc/sys/net).
func forwarding(dir string) Finding {
	v, err := os.ReadFile(filepath.Join(dir, "ipv4/ip_forward"))
	if err != nil || strings.TrimSpace(string(v)) != "1" {
		return warning("IP forwarding", errOr(err, "off (net.ipv4.ip_forward = 0)"),
			"pods reach this machine and each other, but nothing beyond, nor does a hostPort work from beyond",
			"sysctl -w net.ipv4.ip_forward=1 (some plugins, bridge with isGateway, do it themselves)")
	}
	return ok("IP forwarding", "on")
}

func errOr(err error, otherwise string) string {
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return otherwise
}
