package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"text/template"

	"github.com/containerd/errdefs"
)

// generated is the name of the configuration made from Config.ConfTemplate. It is
// podshim's own: no other file is ever written or removed.
const generated = "10-podshim-pod-cidr.conflist"

// templateInput is what a template may use. The names are those of containerd's
// conf_template, so that a template serves both.
type templateInput struct {
	// PodCIDR is the first of PodCIDRRanges.
	PodCIDR       string
	PodCIDRRanges []string
	// Routes has a default route for each family among the ranges.
	Routes []string
}

// readTemplate reads Config.ConfTemplate; "" is none, and gives nil.
func readTemplate(path string) (*template.Template, error) {
	if path == "" {
		return nil, nil
	}
	raw, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("CNI configuration template %s: %w", path, err)
	}
	t, err := template.New(filepath.Base(path)).Option("missingkey=error").Parse(string(raw))
	if err != nil {
		return nil, fmt.Errorf("CNI configuration template: %w", err)
	}
	return t, nil
}

// SetPodCIDRs gives the node's pods these ranges: with a template the network is
// made from it, unless the configuration directory has a network of somebody
// else. When it returns the network is loaded. Without a template the ranges are
// kept for Info alone: then the network's own installer takes care of them.
func (n *Network) SetPodCIDRs(ctx context.Context, ranges []netip.Prefix) error {
	n.making.Lock() // two at a time would write into each other's file
	defer n.making.Unlock()
	ranges = slices.Clone(ranges)
	n.ranges.Store(&ranges)
	log := n.cfg.Log.WithField("ranges", ranges)
	conf, err := readTemplate(n.cfg.ConfTemplate)
	if err != nil {
		return err
	}
	if conf == nil {
		log.Info("pod CIDR is noted: without a template (network.conf_template) the network's installer uses it")
		return nil
	}
	others, err := n.others()
	if err != nil {
		return err
	}
	if len(others) > 0 {
		log.WithField("file", others[0]).Info("pod CIDR is noted: the network has a configuration of its own")
		return nil
	}
	raw, err := render(conf, ranges)
	if err != nil {
		return fmt.Errorf("make network from template %s: %w", n.cfg.ConfTemplate, err)
	}
	if err := n.writeGenerated(raw); err != nil {
		return fmt.Errorf("write network made from template: %w", err)
	}
	log.WithField("file", generated).Info("network is made from the template")
	return n.lookNow(ctx)
}

// others are the files of the configuration directory that are not generated.
func (n *Network) others() ([]string, error) {
	files, err := confFiles(n.cfg.ConfDir)
	if err != nil {
		return nil, fmt.Errorf("read CNI configuration directory: %w", err)
	}
	return slices.DeleteFunc(files, func(path string) bool { return filepath.Base(path) == generated }), nil
}

// render makes the configuration and sees that it is one.
func render(t *template.Template, ranges []netip.Prefix) ([]byte, error) {
	var in templateInput
	var routes4, routes6 []string
	for _, r := range ranges {
		in.PodCIDRRanges = append(in.PodCIDRRanges, r.Masked().String())
		if r.Addr().Is4() {
			routes4 = []string{"0.0.0.0/0"}
		} else {
			routes6 = []string{"::/0"}
		}
	}
	in.PodCIDR, in.Routes = in.PodCIDRRanges[0], append(routes4, routes6...)
	var b bytes.Buffer
	if err := t.Execute(&b, in); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if _, err := parseList(b.Bytes()); err != nil {
		return nil, fmt.Errorf("it gives no CNI configuration list: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return b.Bytes(), nil
}

// writeGenerated puts the file into place at once, for whoever watches.
func (n *Network) writeGenerated(raw []byte) error {
	if err := os.MkdirAll(n.cfg.ConfDir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(n.cfg.ConfDir, generated)
	early := path + ".new" // no name that anybody loads
	err := os.WriteFile(early, raw, 0o644)
	if err == nil {
		err = os.Rename(early, path)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(early))
	}
	return nil
}

// lookNow has the watcher look at the directory and waits for it.
func (n *Network) lookNow(ctx context.Context) error {
	seen := make(chan struct{})
	select {
	case n.look <- seen:
	case <-ctx.Done():
		return fmt.Errorf("load network: %w", context.Cause(ctx))
	}
	<-seen
	return nil
}
