package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// Survey is what networks hold on this machine, by the files that podshim and the
// plugins keep. Nothing is asked of a plugin.
type Survey struct {
	// Attached are the IDs of pods that CacheDir has a record of.
	Attached []string
	// Results are libcni's own records of what plugins have answered.
	Results []string
	// Reserved are the addresses that host-local holds.
	Reserved []Reservation
	// Bridges are the bridges that pods are attached to.
	Bridges []string
}

// Reservation is an address that the plugin host-local keeps for a pod: a file,
// named for the address, that holds the pod's ID and interface. It is empty for a moment
// before it has them, and for good when the plugin is killed in that moment.
type Reservation struct {
	Path, IP, PodID, IfName string

	list *libcni.NetworkConfigList
}

// Look surveys the network of today's configuration, and those that pods are
// still attached to. It changes nothing, and needs no Network.
func Look(cfg Config) (Survey, error) {
	cfg = cfg.withDefaults()
	n := &Network{cfg: cfg}
	n.current.Store(load(cfg, &runner{}))
	var s Survey
	var err error
	if s.Attached, err = n.attachments(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, err
	}
	if s.Results, err = filepath.Glob(filepath.Join(cfg.CacheDir, "results", "*")); err != nil {
		return s, err
	}
	for _, list := range n.lists(s.Attached) {
		for _, p := range list.Plugins {
			var conf pluginConf
			if err := json.Unmarshal(p.Bytes, &conf); err != nil {
				continue // the plugin's own business
			}
			if p.Network.Type == "bridge" {
				s.Bridges = append(s.Bridges, or(conf.Bridge, "cni0"))
			}
			if p.Network.IPAM.Type == "host-local" {
				dir := filepath.Join(or(conf.IPAM.DataDir, "/var/lib/cni/networks"), list.Name)
				if s.Reserved, err = readReservations(s.Reserved, dir, list); err != nil {
					return s, err
				}
			}
		}
	}
	return s, nil
}

// pluginConf is what a survey needs to know of the plugins bridge and host-local.
type pluginConf struct {
	Bridge string `json:"bridge"`
	IPAM   struct {
		DataDir string `json:"dataDir"`
	} `json:"ipam"`
}

func or(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}

// lists are the configuration of today and, by other names, those of attached pods.
func (n *Network) lists(attached []string) []*libcni.NetworkConfigList {
	var lists []*libcni.NetworkConfigList
	seen := map[string]bool{}
	add := func(l *libcni.NetworkConfigList) {
		if l != nil && !seen[l.Name] {
			seen[l.Name] = true
			lists = append(lists, l)
		}
	}
	add(n.current.Load().list)
	for _, id := range attached {
		if a, err := n.readAttachment(id); err == nil {
			add(a.list)
		}
	}
	return lists
}

func readReservations(found []Reservation, dir string, list *libcni.NetworkConfigList) ([]Reservation, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return found, nil
	}
	if err != nil {
		return found, fmt.Errorf("list IP reservations: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() || e.Name() == "lock" || strings.HasPrefix(e.Name(), "last_reserved_ip.") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // given back meanwhile
		}
		id, ifname, _ := strings.Cut(strings.ReplaceAll(string(raw), "\r", ""), "\n")
		found = append(found, Reservation{
			Path: path, IP: strings.ReplaceAll(e.Name(), "_", ":"),
			PodID: strings.TrimSpace(id), IfName: or(strings.TrimSpace(ifname), ifName), list: list,
		})
	}
	return found, nil
}

// Held tells whether the reservation is that pod's still: an address that is free
// goes to the next one. One that is nobody's is held for nobody when no plugin is about
// to write there whose it is.
func (r Reservation) Held() bool {
	if r.PodID != "" {
		raw, err := os.ReadFile(r.Path)
		return err == nil && strings.HasPrefix(string(raw), r.PodID)
	}
	unlock, err := r.lock()
	if err != nil {
		return false // told by a later look
	}
	defer unlock()
	return r.isEmpty()
}

// lock keeps plugins from reserving addresses of the network, as they keep each other
// (plugins/ipam/host-local/backend/disk). It does not wait for one that does.
func (r Reservation) lock() (unlock func(), err error) {
	f, err := os.Open(filepath.Join(filepath.Dir(r.Path), "lock"))
	if errors.Is(err, os.ErrNotExist) {
		return func() {}, nil // no plugin has been here
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

func (r Reservation) isEmpty() bool {
	st, err := os.Stat(r.Path)
	return err == nil && st.Size() == 0
}

// freeNobodys removes a reservation that no DEL can name.
func (r Reservation) freeNobodys() error {
	unlock, err := r.lock()
	if err != nil {
		return fmt.Errorf("free %s: a plugin is at work, try again: %w", r.IP, err)
	}
	defer unlock()
	if !r.isEmpty() {
		return nil // it has been freed, and is somebody's
	}
	return os.Remove(r.Path)
}

// Free gives back what a pod that no record tells of holds at its network, by a
// DEL with the configuration the reservation was found by: what other pods hold
// the plugin does not touch.
func (n *Network) Free(ctx context.Context, r Reservation) error {
	if r.PodID == "" {
		return r.freeNobodys()
	}
	pod := Pod{ID: r.PodID}
	unlock, err := n.pods.lock(ctx, r.PodID)
	if err != nil {
		return fmt.Errorf("free %s: %w", r.IP, err)
	}
	defer unlock()
	if err := n.gate.enter(ctx); err != nil {
		return fmt.Errorf("free %s: %w", r.IP, err)
	}
	defer n.gate.leave()
	a := &attachment{Pod: pod, list: r.list}
	rt := a.runtimeConf()
	rt.IfName = r.IfName
	return a.failure("detach", n.cni.DelNetworkList(ctx, a.list, rt))
}
