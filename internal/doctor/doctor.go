// Package doctor finds what does not belong on a node: whatever bears the name of
// a pod or container that no record knows, and records of what does not run. It
// says why, and puts it right.
//
// # Why it is right beside a daemon that works
//
// Everything a pod or container takes has a name that follows from its ID; an ID
// is used once; it is on record before it takes anything, and forgotten after it
// has given all of it back (docs/design.md, "Ownership"). So the doctor takes no
// lock. It looks at the machine first and at the records after that: what was
// there before, is of no record now, and is there still, is nobody's and will
// never be anybody's. It can be removed at any later time.
//
// Names that do not follow from an ID are judged by who gives them out: layers
// and their directories by the image store, under its locks; a veth by the network
// namespace at its other end.
//
// # What is left alone
//
// A namespace or an address that a process uses which is not podshim's to judge,
// another runtime's pod for example. And what a damaged record may stand for, which
// is everything that no record knows when nobody can tell whose records are lost.
package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/state"
)

// Kind is a kind of thing that can be where it does not belong.
type Kind string

// The kinds, in the order in which they are repaired: processes go before what
// they may use, an address before its namespace, a mount before its directory.
const (
	Record      Kind = "record"               // of what does not run, or that cannot be read
	Monitored   Kind = "container"            // held by podmon, or in its run directory
	Process     Kind = "process"              // in a pod's or container's cgroup, or on podshim's roots
	Attachment  Kind = "network attachment"   // podshim's own record for DEL
	Reservation Kind = "IP reservation"       // host-local's
	Result      Kind = "network result"       // libcni's cache
	Veth        Kind = "veth"                 // a pod's interface on the node's side
	Mount       Kind = "mount"                // in a pod's or container's directory
	Snapshot    Kind = "snapshot"             // a container's writable layer
	Netns       Kind = "namespace"            // a pin of a network or user namespace
	Directory   Kind = "directory"            // of a pod or container
	Cgroup      Kind = "cgroup"               // of a pod or container
	SnapshotDir Kind = "snapshot's directory" // that no snapshot's record knows
	Layer       Kind = "layer"                // that no image needs
	BadImage    Kind = "damaged image"        // whose record cannot be read, or lacks layers
	BadLayer    Kind = "damaged layer"        // that is not as it was unpacked
)

var order = []Kind{Record, Monitored, Process, Attachment, Reservation, Result, Veth, Mount, Snapshot, Netns, Directory, Cgroup, SnapshotDir, Layer, BadImage, BadLayer}

// Finding is one thing that does not belong.
type Finding struct {
	Kind Kind `json:"kind"`
	// Name is a path, an address, a PID, an interface: what to look for.
	Name string `json:"name"`
	// ID is the pod's or container's, or the part of it that the name has.
	ID string `json:"id,omitempty"`
	// Why it does not belong.
	Why string `json:"why"`
	// Remedy is what repair does; empty when it can do nothing, and Hint says what
	// a person can.
	Remedy string `json:"remedy,omitempty"`
	Hint   string `json:"hint,omitempty"`
	// Repaired, or Error why it is not, after a repair.
	Repaired bool   `json:"repaired,omitempty"`
	Error    string `json:"error,omitempty"`
	// InUse: only processes that are in it keep it from being put right.
	InUse bool `json:"in_use,omitempty"`

	// others are IDs that it may belong to as well.
	others []string
	// mortal: it goes when the container ends, and not only with the record.
	mortal bool
	// process is what it is; users are those who need it.
	process process
	users   []process
	there   func() bool
	repair  func(context.Context) error
}

// Books are podshim's records and what podmon holds. Each call gives the state of
// that moment.
type Books interface {
	Sandboxes() []*sandbox.Record
	Containers() []*container.Record
	// Damaged are records and whole databases that cannot be read.
	Damaged() []state.Damage
	// Monitored are the IDs of the containers that podmon holds.
	Monitored() map[string]bool
}

// Hands put things right, by the steps that the daemon itself takes.
type Hands interface {
	// Delete kills what is left of a container and removes all that podmon knows of it.
	Delete(ctx context.Context, id string) error
	// NotRunning notes that what is on record as running is not.
	NotRunning(ctx context.Context, id string) error
}

// Config is what a Doctor looks at.
type Config struct {
	// Run and Root are podshim's directories, NetnsDir that of pinned namespaces.
	Run, Root, NetnsDir string
	// CgroupParent holds the cgroups of pods whose client named none.
	CgroupParent  string
	SystemdCgroup bool
	CNI           cni.Config
	Books         Books
	// Images may be nil: there are none.
	Images *image.Store
	// Contents has every file of every layer read, instead of its length looked at.
	Contents bool
	// Network and Hands are needed by Repair only.
	Network *cni.Network
	Hands   Hands
}

// Doctor examines one podshim's node.
type Doctor struct{ Config }

// New makes a Doctor.
func New(c Config) *Doctor {
	// Mount tables and cgroup files have real paths.
	for _, dir := range []*string{&c.Run, &c.Root, &c.NetnsDir} {
		if real, err := filepath.EvalSymlinks(*dir); err == nil {
			*dir = real
		}
	}
	return &Doctor{c}
}

// anyID is an ID of package ids in a name.
var anyID = regexp.MustCompile(`[0-9a-f]{64}`)

// prefixLen is how much of an ID a pinned namespace's name has.
const prefixLen = 16

// claims are what podshim says is its own.
type claims struct {
	ids     map[string]bool // and the beginnings of sandboxes' IDs
	lost    map[string]bool // the same, of records that cannot be read
	parents []string        // cgroups that hold those of pods and containers
	running map[string]run
	ended   map[string]bool // and nothing of them will ever run again
	damaged []state.Damage
	blind   bool // IDs may be missing
}

// run is what a record says of a process.
type run struct {
	what  string
	alive bool
}

func (d *Doctor) claims() claims {
	c := claims{ids: map[string]bool{}, lost: map[string]bool{}, parents: []string{d.CgroupParent}, running: map[string]run{}, ended: map[string]bool{}, damaged: d.Books.Damaged()}
	for _, r := range d.Books.Sandboxes() {
		c.ids[r.ID], c.ids[r.ID[:min(prefixLen, len(r.ID))]] = true, true
		if r.CgroupParent != "" && r.CgroupParent != "/" && !r.OwnCgroup {
			c.parents = append(c.parents, r.CgroupParent)
		}
		c.ended[r.ID] = r.State == sandbox.NotReady && !r.Failed
		if r.State == sandbox.Ready {
			c.running[r.ID] = run{"pod sandbox " + r.Name, r.Infra.Alive()}
		}
	}
	for _, r := range d.Books.Containers() {
		c.ids[r.ID] = true
		c.ended[r.ID] = r.State == container.Exited && !r.Failed && !r.Unended
		if r.State == container.Running {
			c.running[r.ID] = run{fmt.Sprintf("container %q", r.Config.GetMetadata().GetName()), r.Process.Alive()}
		}
	}
	for _, damage := range c.damaged {
		switch {
		case damage.Past:
		case damage.ID == "":
			c.blind = true
		default:
			c.lost[damage.ID], c.lost[damage.ID[:min(prefixLen, len(damage.ID))]] = true, true
		}
	}
	slices.Sort(c.parents)
	c.parents = slices.Compact(c.parents)
	return c
}

// Examine looks at everything of the kinds given, all of them when none is.
func (d *Doctor) Examine(ctx context.Context, kinds ...Kind) ([]Finding, error) {
	before := d.claims()
	found, err := d.look(ctx, before.parents)
	if err != nil {
		return nil, err
	}
	monitored := d.Books.Monitored()
	after := d.claims()
	found = slices.DeleteFunc(found, func(f Finding) bool {
		owned := func(id string) bool {
			// What podmon holds of an ended container it removes itself.
			return after.ids[id] && !(f.mortal && after.ended[id] && !monitored[id])
		}
		return owned(f.ID) || slices.ContainsFunc(f.others, owned) || f.there != nil && !f.there()
	})
	for i := range found {
		f := &found[i]
		if f.needed(found) {
			f.repair, f.Remedy = nil, ""
			f.Hint, f.InUse = "processes are in it: it is left alone until they have ended", true
		}
		if after.blind || after.lost[f.ID] || slices.ContainsFunc(f.others, func(id string) bool { return after.lost[id] }) {
			f.repair, f.Remedy = nil, ""
			f.Hint, f.InUse = "this may be what a damaged record stood for: it is left alone; see there first", false
		}
	}
	found = append(found, lost(before, after, monitored, d.Hands)...)
	found = append(found, damages(after.damaged)...)
	if len(kinds) == 0 || slices.Contains(kinds, BadLayer) {
		damaged, err := d.damagedImages(ctx)
		if err != nil {
			return nil, fmt.Errorf("look for damage of images: %w", err)
		}
		found = append(found, damaged...)
	}
	if len(kinds) > 0 {
		found = slices.DeleteFunc(found, func(f Finding) bool { return !slices.Contains(kinds, f.Kind) })
	}
	slices.SortFunc(found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
	return found, nil
}

// needed tells whether somebody uses the thing who is not to go as well.
func (f *Finding) needed(found []Finding) bool {
	return slices.ContainsFunc(f.users, func(p process) bool {
		return !slices.ContainsFunc(found, func(g Finding) bool { return g.Kind == Process && g.process.Process == p.Process })
	})
}

// look lists what may not belong; the records are looked at after that.
func (d *Doctor) look(ctx context.Context, parents []string) ([]Finding, error) {
	machine, err := readMachine(d.Run, d.Root)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, kind := range []struct {
		what string
		look func(context.Context, *machineView, []string) ([]Finding, error)
	}{
		{"processes and cgroups", d.lookAtCgroups},
		{"directories and mounts", d.lookAtFiles},
		{"namespaces and networks", d.lookAtNetwork},
		{"images", d.lookAtImages},
	} {
		more, err := kind.look(ctx, machine, parents)
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", kind.what, err)
		}
		found = append(found, more...)
	}
	return found, nil
}

// lost are the records of what should run and does not. As long as podmon holds
// it, its end is podmon's to tell, and may be under way.
func lost(before, after claims, monitored map[string]bool, hands Hands) []Finding {
	var found []Finding
	for id, was := range before.running {
		now, still := after.running[id]
		if !still || now.alive || was.alive || monitored[id] {
			continue
		}
		found = append(found, Finding{
			Kind: Record, Name: was.what, ID: id,
			Why:    "it is on record as running, its process is gone, and podmon does not hold it",
			Remedy: "note its end, with an unknown exit code",
			repair: func(ctx context.Context) error { return hands.NotRunning(ctx, id) },
		})
	}
	return found
}

func damages(damaged []state.Damage) []Finding {
	var found []Finding
	for _, d := range damaged {
		f := Finding{Kind: Record, Name: d.Path, ID: d.ID, Why: "it cannot be read: " + d.Err.Error()}
		f.Hint = "what it stands for is left alone until the machine is restarted, or " + d.Path + " is removed and then podshim restarted"
		if d.Past {
			f.Hint = "what it stood for has ended with the last restart of the machine: podshim sets it aside when it starts"
		}
		if d.ID != "" {
			f.Name = fmt.Sprintf("%s/%s", d.Kind, d.ID)
		}
		found = append(found, f)
	}
	return found
}

// repairLimit bounds the repair of one finding; a plugin's own limit is below it.
const repairLimit = 2 * time.Minute

// repairers is how many findings of a kind are repaired at once: none of them waits for
// one that takes its time, a plugin's for example.
const repairers = 16

// Repair puts right what Examine has found, kind by kind. It goes on after a failure,
// which is noted with the finding.
func (d *Doctor) Repair(ctx context.Context, found []Finding) {
	for len(found) > 0 {
		kind := found[0].Kind
		n := slices.IndexFunc(found, func(f Finding) bool { return f.Kind != kind })
		if n < 0 {
			n = len(found)
		}
		repairEach(ctx, found[:n])
		found = found[n:]
	}
}

func repairEach(ctx context.Context, found []Finding) {
	lanes := make(map[string][]*Finding)
	for i := range found {
		lane := found[i].lane()
		lanes[lane] = append(lanes[lane], &found[i])
	}
	slots := make(chan struct{}, repairers)
	var work sync.WaitGroup
	for _, lane := range lanes {
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			for _, f := range lane {
				f.put(ctx)
			}
		})
	}
	work.Wait()
}

// lane is the same for findings of a kind that may be within each other: they are
// repaired one after another.
func (f *Finding) lane() string {
	switch f.Kind {
	case Mount:
		return f.ID
	case Cgroup:
		if at := anyID.FindStringIndex(f.Name); at != nil {
			return f.Name[:at[1]]
		}
	}
	return f.Name
}

// put puts a finding right.
func (f *Finding) put(ctx context.Context) {
	if f.repair == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	err := f.repair(ctx)
	if err == nil && f.there != nil && f.there() {
		err = errors.New("repair ended without an error, but it is there still: look at it by hand")
	}
	if f.Repaired = err == nil; err != nil {
		f.Error = err.Error()
	}
}

// exists tells whether anything is at path.
func exists(path string) func() bool {
	return func() bool {
		_, err := os.Lstat(path)
		return err == nil
	}
}
