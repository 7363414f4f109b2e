package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/podshim/podshim/internal/rollback"
)

// Add attaches a pod to the network and gives its addresses.
//
// When it fails, whichever plugin it was, DEL has been run; if that failed too,
// the record that a later Del needs is kept and the error holds both. A pod that
// an earlier process was attaching, or that is attached, is detached first.
//
// Errors: errdefs.ErrInvalidArgument for a pod that cannot be named to plugins,
// errdefs.ErrUnavailable without a network or when a plugin hangs, the context's
// own, *PluginError.
func (n *Network) Add(ctx context.Context, pod Pod) (_ Result, err error) {
	if err := pod.validate(); err != nil {
		return Result{}, err
	}
	unlock, err := n.pods.lock(ctx, pod.ID)
	if err != nil {
		return Result{}, fmt.Errorf("attach %s: %w", pod, err)
	}
	defer unlock()
	if err := n.gate.enter(ctx); err != nil {
		return Result{}, fmt.Errorf("attach %s: %w", pod, err)
	}
	defer n.gate.leave()

	l := n.current.Load()
	if l.err != nil {
		return Result{}, fmt.Errorf("attach %s: %w", pod, unavailable{l.err})
	}
	if err := n.detach(ctx, pod.ID); err != nil {
		return Result{}, err
	}
	a := &attachment{Pod: pod, list: l.list}
	if !n.cfg.IdlePlugins {
		a.list = withoutIdle(l.list, pod.capabilities())
	}
	n.setLive(pod.ID, true)
	var undo rollback.Stack
	defer func() { err = undo.Settle(ctx, err) }()
	undo.Push("detach network", func(ctx context.Context) error { return n.detach(ctx, pod.ID) })
	if err := n.writeAttachment(a); err != nil {
		return Result{}, err
	}
	if a.ignoresPorts() {
		n.cfg.Log.WithField("sandbox", pod.ID).WithField("network", a.list.Name).Warn(
			"no plugin of the network declares the capability portMappings: the pod's host ports are left to whoever else makes them")
	}
	if !n.cfg.IdleIPv6 && !pod.IPv6 && givesIPv4Only(a.list) {
		log := n.cfg.Log.WithField("sandbox", pod.ID)
		if back, err := withoutIPv6(pod.Netns); err != nil {
			log.WithError(err).Warn("the pod's interfaces have IPv6 link-local addresses")
		} else {
			defer func() {
				if err := back(); err != nil {
					log.WithError(err).Warn("interfaces that the pod makes itself begin with IPv6 off")
				}
			}()
		}
	}
	n.forgetProc()
	raw, err := n.cni.AddNetworkList(ctx, a.list, a.runtimeConf())
	if err != nil {
		return Result{}, a.failure("attach", err)
	}
	result, err := readResult(raw)
	if err != nil {
		return Result{}, a.failure("attach", err)
	}
	return result, nil
}

// Del detaches a pod with the configuration it was attached with. A pod that is
// not attached, or whose namespace is gone, is success. When a plugin fails the
// record stays, and Del may be tried again.
//
// Only the pod's ID is looked at.
func (n *Network) Del(ctx context.Context, pod Pod) error {
	if err := utils.ValidateContainerID(pod.ID); err != nil {
		return fmt.Errorf("detach pod %q: %w: %w", pod.ID, err, errdefs.ErrInvalidArgument)
	}
	unlock, err := n.pods.lock(ctx, pod.ID)
	if err != nil {
		return fmt.Errorf("detach %s: %w", pod, err)
	}
	defer unlock()
	if err := n.gate.enter(ctx); err != nil {
		return fmt.Errorf("detach %s: %w", pod, err)
	}
	defer n.gate.leave()
	return n.detach(ctx, pod.ID)
}

// detach does Del's work; the pod's lock is held.
func (n *Network) detach(ctx context.Context, id string) error {
	if err := n.awaitOrphans(ctx, id); err != nil {
		return err
	}
	a, err := n.readAttachment(id)
	if errdefs.IsNotFound(err) {
		n.setLive(id, false)
		return nil
	}
	if err != nil {
		return err
	}
	rt := a.runtimeConf()
	if !isNamespace(rt.NetNS) {
		// Gone with a reboot, or a plain file: plugins take an empty path for
		// "free the rest", and some fail on a path that is no namespace.
		rt.NetNS = ""
	}
	if err := n.cni.DelNetworkList(ctx, a.list, rt); err != nil {
		return a.failure("detach", err)
	}
	// libcni says nothing when it cannot forget what the plugins had answered.
	result := filepath.Join(n.cfg.CacheDir, "results", a.list.Name+"-"+id+"-"+ifName)
	if err := os.Remove(result); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget network of pod %s: %w", id, err)
	}
	if err := n.removeAttachment(id); err != nil {
		return err
	}
	n.setLive(id, false)
	return nil
}

// String is how errors name a pod.
func (p Pod) String() string {
	if p.Name == "" {
		return "pod " + p.ID
	}
	return fmt.Sprintf("pod %s/%s (%s)", p.Namespace, p.Name, p.ID)
}

// validate refuses what would change its meaning on the way to a plugin.
func (p Pod) validate() error {
	if err := utils.ValidateContainerID(p.ID); err != nil {
		return fmt.Errorf("attach pod: ID %q: %w: %w", p.ID, err, errdefs.ErrInvalidArgument)
	}
	if p.Netns == "" {
		return fmt.Errorf("attach %s: no network namespace: %w", p, errdefs.ErrInvalidArgument)
	}
	for field, value := range map[string]string{"name": p.Name, "namespace": p.Namespace, "UID": p.UID} {
		// CNI_ARGS is "KEY=VALUE;KEY=VALUE" and knows no escapes.
		if strings.ContainsAny(value, ";=\x00\n") {
			return fmt.Errorf("attach pod %s: its %s %q has one of \";=\" or a control character: %w",
				p.ID, field, value, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// attachment is what a pod was attached with.
type attachment struct {
	Pod Pod `json:"pod"`
	// List is the whole configuration, see freeze.
	List json.RawMessage `json:"list"`

	list *libcni.NetworkConfigList
}

func (a *attachment) runtimeConf() *libcni.RuntimeConf {
	p := a.Pod
	return &libcni.RuntimeConf{
		ContainerID: p.ID,
		NetNS:       p.Netns,
		IfName:      ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
			{"K8S_POD_UID", p.UID},
		},
		CapabilityArgs: p.capabilities(),
	}
}

// ignoresPorts tells whether the pod has host ports and no plugin that would be
// told of them. That is no error: there are networks that learn host ports from
// the Kubernetes API.
func (a *attachment) ignoresPorts() bool {
	if _, has := a.Pod.capabilities()["portMappings"]; !has {
		return false
	}
	return !slices.ContainsFunc(a.list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities["portMappings"] })
}

// capabilities are the values for plugins that declare the capability; libcni
// picks.
func (p Pod) capabilities() map[string]any {
	caps := map[string]any{}
	exposed := slices.DeleteFunc(slices.Clone(p.PortMappings), func(m PortMapping) bool { return m.HostPort <= 0 })
	for i := range exposed {
		exposed[i].Protocol = strings.ToLower(exposed[i].Protocol)
	}
	if len(exposed) > 0 {
		caps["portMappings"] = exposed
	}
	if p.Bandwidth != nil {
		caps["bandwidth"] = p.Bandwidth
	}
	if len(p.IPs) > 0 {
		caps["ips"] = p.IPs
	}
	if p.MAC != "" {
		caps["mac"] = p.MAC
	}
	if p.DNS != nil {
		caps["dns"] = p.DNS
	}
	if p.CgroupParent != "" {
		caps["cgroupPath"] = p.CgroupParent
	}
	if len(p.Annotations) > 0 {
		caps["io.kubernetes.cri.pod-annotations"] = p.Annotations
	}
	return caps
}

// failure names the operation, the pod and the network in front of the plugin's
// own words, without libcni's in between.
func (a *attachment) failure(verb string, err error) error {
	if err == nil {
		return nil
	}
	var perr *PluginError
	if errors.As(err, &perr) {
		err = perr
	}
	return fmt.Errorf("%s %s, network %q: %w", verb, a.Pod, a.list.Name, err)
}

// readResult takes the default interface's addresses out of the plugins' result.
func readResult(raw types.Result) (Result, error) {
	r, err := types100.GetResult(raw)
	if err != nil {
		return Result{}, fmt.Errorf("read plugins' result: %w", err)
	}
	out := Result{Interface: ifName}
	for _, ip := range r.IPs {
		mine, err := onDefault(r, ip)
		if err != nil {
			return Result{}, err
		}
		if !mine {
			continue
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return Result{}, errors.New("read plugins' result: an IP without address")
		}
		if addr = addr.Unmap(); !slices.Contains(out.IPs, addr) {
			out.IPs = append(out.IPs, addr)
		}
	}
	if len(out.IPs) == 0 {
		return Result{}, fmt.Errorf("the plugins gave %s no IP address: see the network's ipam section", ifName)
	}
	if out.Raw, err = json.Marshal(r); err != nil {
		return Result{}, fmt.Errorf("keep plugins' result: %w", err)
	}
	return out, nil
}

// onDefault tells whether the address is on the default interface; one that
// names no interface is.
func onDefault(r *types100.Result, ip *types100.IPConfig) (bool, error) {
	if ip.Interface == nil {
		return true, nil
	}
	i := *ip.Interface
	if i < 0 || i >= len(r.Interfaces) {
		return false, fmt.Errorf("read plugins' result: an IP of interface %d of %d", i, len(r.Interfaces))
	}
	return r.Interfaces[i].Name == ifName, nil
}

func gcAttachments(ids map[string]struct{}) []types.GCAttachment {
	out := make([]types.GCAttachment, 0, len(ids))
	for id := range ids {
		out = append(out, types.GCAttachment{ContainerID: id, IfName: ifName})
	}
	return out
}

func (n *Network) attachmentPath(id string) string {
	return filepath.Join(n.cfg.CacheDir, "attachments", id+".json")
}

// writeAttachment makes the record appear whole or not at all.
func (n *Network) writeAttachment(a *attachment) (err error) {
	if a.List, err = freeze(a.list); err != nil {
		return fmt.Errorf("record network of %s: %w", a.Pod, err)
	}
	raw, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("record network of %s: %w", a.Pod, err)
	}
	path := n.attachmentPath(a.Pod.ID)
	err = os.WriteFile(path+".new", raw, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("record network of %s: %w", a.Pod, err), os.RemoveAll(path+".new"))
	}
	return nil
}

// readAttachment finds what a pod was attached with. A record that a power
// failure has spoilt is made up for by the network of today.
//
// Errors: errdefs.ErrNotFound when the pod is not attached.
func (n *Network) readAttachment(id string) (*attachment, error) {
	raw, err := os.ReadFile(n.attachmentPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("pod %s is attached to no network: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read network of pod %s: %w", id, err)
	}
	a := &attachment{}
	if err = json.Unmarshal(raw, a); err == nil {
		a.list, err = parseList(a.List)
	}
	if err == nil {
		return a, nil
	}
	l := n.current.Load()
	if l.list == nil {
		return nil, fmt.Errorf("read network of pod %s (%s): %w", id, n.attachmentPath(id), err)
	}
	n.cfg.Log.WithField("sandbox", id).WithError(err).Warn("the record of the pod's network is spoilt; using the present configuration")
	return &attachment{Pod: Pod{ID: id}, list: l.list}, nil
}

func (n *Network) removeAttachment(id string) error {
	for _, path := range []string{n.attachmentPath(id), n.attachmentPath(id) + ".new"} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("forget network of pod %s: %w", id, err)
		}
	}
	return nil
}

// attachments lists the IDs of the pods that have a record.
func (n *Network) attachments() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(n.cfg.CacheDir, "attachments"))
	if err != nil {
		return nil, fmt.Errorf("list attached pods: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
