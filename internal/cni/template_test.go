package cni

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
)

// Ranges that are told at the same time make a whole network, of one of them.
func TestRangesAtTheSameTime(t *testing.T) {
	dir := t.TempDir()
	template := filepath.Join(dir, "template")
	conf := `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"none","ranges":"{{.PodCIDRRanges}}"}]}`
	if err := os.WriteFile(template, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	n, err := New(Config{
		ConfDir: filepath.Join(dir, "net.d"), ConfTemplate: template, BinDirs: []string{dir},
		CacheDir: filepath.Join(dir, "cache"), PluginTimeout: time.Minute, Log: logrus.NewEntry(log),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var g errgroup.Group
	for i := range 4 {
		ranges := make([]netip.Prefix, i+1)
		for j := range ranges {
			ranges[j] = netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", i, j))
		}
		g.Go(func() error {
			for range 50 {
				if err := n.SetPodCIDRs(t.Context(), ranges); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	raw, err := os.ReadFile(filepath.Join(n.cfg.ConfDir, generated))
	if err == nil {
		_, err = parseList(raw)
	}
	if err != nil {
		t.Errorf("%s: %v", raw, err)
	}
}
