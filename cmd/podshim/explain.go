package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/timeline"
)

func newExplainCommand(s *settings) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain POD|CONTAINER",
		Short: "Say why a pod does not run, where its time went, and what it shares",
		Long: `Say of a pod, by name, NAMESPACE/NAME or the beginning of its ID, or of the pod of a
container, by the beginning of its ID: its state and why it is in it, how each
container has ended, which namespaces its containers share, and how long each step of
the calls that made it took. Pods that could not be made, and images that could not be
pulled for them, are explained as well: the running podshim remembers the last calls.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			var all []explanation
			if err := askDaemon(cmd.Context(), cfg, "explain", url.Values{"what": args}, &all); err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(all)
			}
			for _, e := range all {
				if err := e.write(cmd.OutOrStdout()); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print it as JSON")
	return cmd
}

// explanation is what there is to say of one pod.
type explanation struct {
	Pod string `json:"pod"`
	// ID is empty for a pod that could not be made.
	ID         string            `json:"id,omitempty"`
	State      string            `json:"state"`
	Why        string            `json:"why,omitempty"`
	IPs        []string          `json:"ips,omitempty"`
	Cgroup     string            `json:"cgroup,omitempty"`
	Namespaces map[string]string `json:"namespaces,omitempty"`
	// Node are the kinds of the pod's namespaces that are podshim's own, so the node's.
	Node       []string             `json:"node,omitempty"`
	Containers []explained          `json:"containers,omitempty"`
	Calls      []timeline.Operation `json:"calls,omitempty"`
}

// explained is one container of the pod.
type explained struct {
	Name  string `json:"name"`
	ID    string `json:"id"`
	State string `json:"state"`
	Why   string `json:"why,omitempty"`
	// Shares are the kinds of namespaces that it has in common with infra, Own
	// those that are its own.
	Shares []string `json:"shares,omitempty"`
	Own    []string `json:"own,omitempty"`
	// Mounts are the host's directories in it.
	Mounts []string `json:"mounts,omitempty"`
}

// explain finds what is asked for, running or not, and what the calls about it say.
func (d *parts) explain(what string) ([]explanation, error) {
	var found []explanation
	for _, r := range d.sandboxes.All() {
		md := r.Config.GetMetadata()
		ids := []string{r.ID}
		for _, c := range d.containers.InSandbox(r.ID) {
			ids = append(ids, c.ID)
		}
		if names(what, md.GetNamespace(), md.GetName(), ids) {
			found = append(found, d.explainPod(r, ids))
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	// Nothing is there: the calls may tell of what could not be made.
	calls := d.timeline.Find(func(s timeline.Subject) bool { return names(what, s.Namespace, s.Pod, []string{s.ID}) })
	if len(calls) == 0 {
		return nil, fmt.Errorf("pod or container %q: nothing has that name or ID, and no recent call was about it: %w", what, errdefs.ErrNotFound)
	}
	last := calls[len(calls)-1]
	return []explanation{{
		Pod: last.Namespace + "/" + last.Pod, State: "not there", Why: whyGone(calls), Calls: calls,
	}}, nil
}

// names tells whether what is the pod's name, its full one, or the beginning of an ID.
func names(what, namespace, pod string, ids []string) bool {
	if what == "" {
		return false
	}
	if pod != "" && (what == pod || what == namespace+"/"+pod) {
		return true
	}
	for _, id := range ids {
		if strings.HasPrefix(id, what) {
			return true
		}
	}
	return false
}

// whyGone is the last error, unless the pod was made after it: then it is there no
// more because it was removed.
func whyGone(calls []timeline.Operation) string {
	for _, c := range slices.Backward(calls) {
		switch {
		case c.Error != "":
			return c.Name + ": " + c.Error
		case c.Name == "RunPodSandbox" && !c.Running:
			return "it was made, and has been removed since"
		}
	}
	return ""
}

func (d *parts) explainPod(r *sandbox.Record, ids []string) explanation {
	md := r.Config.GetMetadata()
	e := explanation{
		Pod: md.GetNamespace() + "/" + md.GetName(), ID: r.ID, State: string(r.State), Why: r.Reason,
		Cgroup: r.CgroupParent, Namespaces: namespacesOf(r.Infra),
	}
	node := namespaceLinks(os.Getpid())
	for _, kind := range namespaceKinds {
		if link := e.Namespaces[kind]; link != "" && link == node[kind] {
			e.Node = append(e.Node, kind)
		}
	}
	for _, ip := range r.IPs {
		e.IPs = append(e.IPs, ip.String())
	}
	e.Calls = d.timeline.Find(func(s timeline.Subject) bool {
		if s.Pod != "" {
			return s.Pod == md.GetName() && s.Namespace == md.GetNamespace()
		}
		for _, id := range ids {
			if s.ID != "" && strings.HasPrefix(id, s.ID) {
				return true
			}
		}
		return false
	})
	for _, c := range d.containers.InSandbox(r.ID) {
		e.Containers = append(e.Containers, explainContainer(c, e.Namespaces))
		for i := range e.Calls { // StartContainer names its container by ID only
			if call := &e.Calls[i]; call.ID != "" && strings.HasPrefix(c.ID, call.ID) {
				call.Container = c.Config.GetMetadata().GetName()
			}
		}
	}
	return e
}

// namespaceKinds are those that containers of a pod may share.
var namespaceKinds = []string{"net", "ipc", "uts", "pid", "user", "mnt", "cgroup"}

// namespacesOf asks the kernel; a process that is gone has none.
func namespacesOf(p monitor.Process) map[string]string {
	if !p.Alive() {
		return nil
	}
	return namespaceLinks(p.PID)
}

func namespaceLinks(pid int) map[string]string {
	found := map[string]string{}
	for _, kind := range namespaceKinds {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil {
			found[kind] = link
		}
	}
	return found
}

func explainContainer(c *container.Record, infra map[string]string) explained {
	e := explained{Name: c.Config.GetMetadata().GetName(), ID: c.ID, State: string(c.State)}
	if c.State == container.Exited {
		e.Why = fmt.Sprintf("%s, exit code %d", c.Reason, c.ExitCode)
		if c.Message != "" {
			e.Why += ": " + c.Message
		}
	}
	for _, kind := range namespaceKinds {
		switch own := namespacesOf(c.Process)[kind]; {
		case own == "":
		case own == infra[kind]:
			e.Shares = append(e.Shares, kind)
		default:
			e.Own = append(e.Own, kind)
		}
	}
	for _, m := range c.Config.GetMounts() {
		if m.GetHostPath() != "" {
			e.Mounts = append(e.Mounts, m.GetHostPath()+" at "+m.GetContainerPath())
		}
	}
	return e
}

// write prints it for people.
func (e explanation) write(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "pod %s  %s  %s\n", e.Pod, e.State, e.ID)
	line := func(indent, name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s%s: %s\n", indent, name, value)
		}
	}
	line("  ", "why", e.Why)
	line("  ", "IPs", strings.Join(e.IPs, ", "))
	line("  ", "cgroup", e.Cgroup)
	line("  ", "namespaces of the node", strings.Join(e.Node, " "))
	for _, c := range e.Containers {
		fmt.Fprintf(&b, "  container %s  %s  %s\n", c.Name, c.State, c.ID)
		line("    ", "why", c.Why)
		line("    ", "shares with the pod", strings.Join(c.Shares, " "))
		line("    ", "its own", strings.Join(c.Own, " "))
		line("    ", "mounts", strings.Join(c.Mounts, ", "))
	}
	for _, call := range e.Calls {
		fmt.Fprintf(&b, "  %s %s%s%s  %s\n", call.Began.Format(time.TimeOnly), call.Name, spaced(call.Container), spaced(call.Image), took(call.Took, call.Running))
		line("    ", "failed", call.Error)
		for _, s := range call.Steps {
			fmt.Fprintf(&b, "    %-20s %s\n", s.Name, took(s.Took, false))
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func spaced(s string) string {
	if s == "" {
		return ""
	}
	return " " + s
}

func took(d time.Duration, running bool) string {
	if running {
		return "under way"
	}
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}
