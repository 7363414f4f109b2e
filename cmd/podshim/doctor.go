package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/doctor"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/state"
)

// errUnwell makes the exit status 1; the findings are printed before.
var errUnwell = errors.New("something does not belong here; the findings above say what and why")

func newDoctorCommand(s *settings) *cobra.Command {
	var asJSON bool
	var exam examination
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find what does not belong, say why, and put it right",
		Long: `Find what bears the name of a pod or container that podshim does not have:
processes, cgroups, network namespaces, veths, IP reservations, network records,
mounts, directories, snapshots and layers; records of what does not run, or that
cannot be read; and layers and images that are damaged. Each finding says why it does
not belong, and what repair does.

Of every file of an image its type and length are looked at, which takes about a
second for 100,000 files. --contents has them read and their checksums compared: as
long as the disk takes to read all images.

Beside a running daemon the daemon itself looks and repairs, so that a pod that is
being made or removed at this moment is no finding. Without one, the state is read
and nothing is changed; --repair then does what a start of podshim does, without
serving: it takes up podmon and all that runs, and repairs what is left.

Exit status: 0 when nothing was found, or all of it is repaired; 1 otherwise.`,
		Example: `  podshim doctor                what does not belong?
  podshim doctor --repair       put it right; what runs is not touched
  podshim doctor --contents     and is every file of the images as it was unpacked?
  podshim doctor --json | jq -r '.findings[].name'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			report, err := consult(cmd.Context(), cfg, exam, newLogger(cfg, cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(report)
			} else {
				err = report.write(cmd.OutOrStdout())
			}
			if err == nil && report.left() > 0 {
				err = errUnwell
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the findings as JSON")
	cmd.Flags().BoolVar(&exam.repair, "repair", false, "put right what is found")
	cmd.Flags().BoolVar(&exam.contents, "contents", false, "read every file of every image")
	return cmd
}

// examination is what the doctor is asked for.
type examination struct{ repair, contents bool }

// diagnosis is what doctor prints.
type diagnosis struct {
	// Daemon tells whether a running daemon has looked.
	Daemon   bool             `json:"daemon"`
	Findings []doctor.Finding `json:"findings"`
}

// left counts what is not repaired.
func (r *diagnosis) left() int {
	n := 0
	for _, f := range r.Findings {
		if !f.Repaired {
			n++
		}
	}
	return n
}

// write prints the findings for people.
func (r *diagnosis) write(out io.Writer) error {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%s %s\n  why: %s\n", f.Kind, f.Name, f.Why)
		switch {
		case f.Repaired:
			b.WriteString("  repaired\n")
		case f.Error != "":
			fmt.Fprintf(&b, "  not repaired: %s\n", f.Error)
		case f.Remedy != "":
			fmt.Fprintf(&b, "  --repair: %s\n", f.Remedy)
		default:
			fmt.Fprintf(&b, "  by hand: %s\n", f.Hint)
		}
	}
	who := "podshim does not run"
	if r.Daemon {
		who = "podshim runs"
	}
	fmt.Fprintf(&b, "%d found, %d repaired; %s.\n", len(r.Findings), len(r.Findings)-r.left(), who)
	_, err := io.WriteString(out, b.String())
	return err
}

// consult asks the daemon, or looks itself when there is none.
func consult(ctx context.Context, cfg *config.Config, exam examination, log *logrus.Logger) (*diagnosis, error) {
	lock, err := lockIdle(cfg.Run)
	if errors.Is(err, unix.EWOULDBLOCK) {
		report := &diagnosis{Daemon: true}
		args := url.Values{"repair": {fmt.Sprint(exam.repair)}, "contents": {fmt.Sprint(exam.contents)}}
		return report, askDaemon(ctx, cfg, "doctor", args, report)
	}
	if err != nil {
		return nil, err
	}
	found, err := doctor.Alone(ctx, cfg, exam.contents)
	if lock != nil {
		err = errors.Join(err, lock.Close())
	}
	if err == nil && exam.repair && len(found) > 0 {
		found, err = repairAlone(ctx, cfg, found, exam, log)
	}
	return &diagnosis{Findings: found}, err
}

// lockIdle takes the lock of a run directory that no podshim uses, so that none
// starts meanwhile. nil is one that no podshim has ever used; EWOULDBLOCK, in the
// chain, tells of a podshim that runs.
func lockIdle(run string) (*os.File, error) {
	lock, err := os.Open(filepath.Join(run, "lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", run, err), lock.Close())
	}
	return lock, nil
}

// repairAlone starts the daemon's parts, which give back what they find, repairs
// what is left of the findings, and takes the parts down again.
func repairAlone(ctx context.Context, cfg *config.Config, found []doctor.Finding, exam examination, log *logrus.Logger) (_ []doctor.Finding, err error) {
	log.SetLevel(logrus.WarnLevel)
	d := &parts{cfg: cfg, log: log}
	defer func() { err = errors.Join(err, d.dismissPodmon(ctx), d.close()) }()
	if err := d.build(ctx, d.steps()); err != nil {
		return nil, err
	}
	left, err := d.examine(ctx, exam)
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		same := func(g doctor.Finding) bool { return g.Kind == f.Kind && g.Name == f.Name }
		if !slices.ContainsFunc(left.Findings, same) {
			f.Repaired = true
			left.Findings = append(left.Findings, f)
		}
	}
	return left.Findings, nil
}

// doctor is the daemon's own.
func (d *parts) doctor() *doctor.Doctor {
	conf := doctor.ConfigOf(d.cfg)
	conf.SystemdCgroup = d.host.SystemdCgroup
	conf.Books, conf.Images, conf.Network, conf.Hands = live{d}, d.images, d.network, live{d}
	return doctor.New(conf)
}

// examine looks, and repairs if asked to.
func (d *parts) examine(ctx context.Context, exam examination) (*diagnosis, error) {
	dr := d.doctor()
	dr.Contents = exam.contents
	found, err := dr.Examine(ctx)
	if err != nil {
		return nil, err
	}
	if exam.repair {
		// What is begun is finished, also when the caller gives up.
		dr.Repair(context.WithoutCancel(ctx), found)
		d.note(found)
	}
	return &diagnosis{Daemon: true, Findings: found}, nil
}

// mend gives back, at the start, what no record knows of what lies in podshim's
// own directories: what a power cut or a damaged database took the record of. What
// processes are in, such as a plugin that detaches the pod, is looked at again.
func (d *parts) mend(ctx context.Context) {
	dr := d.doctor()
	said := map[string]bool{}
	for pause := time.Second; ; pause = min(2*pause, longestMendPause) {
		found, err := dr.Examine(ctx, doctor.Monitored, doctor.Mount, doctor.Snapshot, doctor.Netns, doctor.Directory)
		if err != nil {
			if ctx.Err() == nil {
				d.log.WithError(err).Warn("look for what no record knows")
			}
			return
		}
		dr.Repair(ctx, found)
		d.note(slices.DeleteFunc(slices.Clone(found), func(f doctor.Finding) bool {
			thing := string(f.Kind) + " " + f.Name
			known := said[thing]
			said[thing] = !f.Repaired
			return known && !f.Repaired
		}))
		if !slices.ContainsFunc(found, func(f doctor.Finding) bool { return f.InUse }) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// longestMendPause is between two looks at what processes of others are in.
const longestMendPause = 5 * time.Minute

func (d *parts) note(found []doctor.Finding) {
	for _, f := range found {
		log := d.log.WithFields(logrus.Fields{string(f.Kind): f.Name, "why": f.Why})
		switch {
		case f.Repaired:
			log.Warn("put right what does not belong here: " + f.Remedy)
		case f.Error != "":
			log.WithField("error", f.Error).Error("what does not belong here is there still")
		default:
			log.Warn(f.Hint)
		}
	}
}

// live is the running daemon to its doctor.
type live struct{ *parts }

func (l live) Sandboxes() []*sandbox.Record    { return l.sandboxes.All() }
func (l live) Containers() []*container.Record { return l.containers.All() }

func (l live) Damaged() []state.Damage {
	damaged := l.records.Damages()
	unreadable := errors.New("it makes no sense; the log of podshim's start says more")
	for kind, ids := range map[state.Kind][]string{
		state.Sandboxes: l.sandboxes.Damaged(), state.Containers: l.containers.Damaged(),
	} {
		for _, id := range ids {
			damaged = append(damaged, state.Damage{Path: "the record", Kind: kind, ID: id, Err: unreadable})
		}
	}
	return damaged
}

func (l live) Monitored() map[string]bool {
	held := map[string]bool{}
	for _, s := range l.monitor.List() {
		held[s.ID] = true
	}
	return held
}

func (l live) Delete(ctx context.Context, id string) error { return l.monitor.Delete(ctx, id) }

func (l live) NotRunning(ctx context.Context, id string) error {
	e := monitor.Event{ID: id, Exit: monitor.Exit{At: time.Now()}}
	if l.sandboxes.Owns(id) {
		return l.sandboxes.Exited(ctx, e)
	}
	return l.containers.Exited(ctx, e)
}
