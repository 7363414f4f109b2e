// Package check says whether this machine can run podshim, and what to do where
// it cannot.
//
// Every line of a [Report] is one thing that was looked at: what was found, and,
// unless that is fine, what follows from it and what to do about it. A failure
// is something podshim cannot work without; a warning costs a named feature.
//
// Things are tried rather than concluded from version numbers: the overlay
// filesystem is mounted, a user namespace is made, an exit code is read through
// a pidfd. All of it is undone before [Run] returns, and nothing that belongs to
// a running podshim is touched.
package check

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/podshim/podshim/internal/config"
)

// Level is how bad a finding is.
type Level string

// The levels, from best to worst.
const (
	OK      Level = "ok"
	Warning Level = "warning"
	Failure Level = "failure"
)

// Finding is one thing that was looked at.
type Finding struct {
	// Area groups findings: kernel, cgroup, privileges, network, files, leftovers.
	Area string `json:"area"`
	// Name is what was looked at.
	Name  string `json:"name"`
	Level Level  `json:"level"`
	// Found is what there is.
	Found string `json:"found"`
	// Consequence and Remedy are empty when the level is OK.
	Consequence string `json:"consequence,omitempty"`
	Remedy      string `json:"remedy,omitempty"`
}

// Report is all findings, by area.
type Report struct {
	Findings []Finding `json:"findings"`
	// CanRun is false when there is a failure among the findings.
	CanRun bool `json:"can_run"`
}

// Run looks at this machine with the eyes of a podshim that was started with
// the completed configuration cfg. It needs a second or less.
func Run(ctx context.Context, cfg *config.Config) Report {
	r := Report{CanRun: true}
	for _, area := range []struct {
		name string
		look func(context.Context, *config.Config) []Finding
	}{
		{"kernel", kernel},
		{"cgroup", cgroup},
		{"privileges", privileges},
		{"network", network},
		{"files", files},
		{"leftovers", leftovers},
	} {
		for _, f := range area.look(ctx, cfg) {
			f.Area = area.name
			r.Findings = append(r.Findings, f)
			r.CanRun = r.CanRun && f.Level != Failure
		}
	}
	return r
}

// Count says how many findings have the level.
func (r Report) Count(level Level) int {
	n := 0
	for _, f := range r.Findings {
		if f.Level == level {
			n++
		}
	}
	return n
}

// WriteTable writes the findings for people, one a line, what follows from them
// beneath, and a verdict at the end.
func (r Report) WriteTable(out io.Writer) error {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	area := ""
	for _, f := range r.Findings {
		shown := ""
		if f.Area != area {
			area, shown = f.Area, f.Area
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", shown, f.Level, f.Name, f.Found)
		if f.Consequence != "" {
			fmt.Fprintf(w, "\t\t\t- %s\n", f.Consequence)
		}
		if f.Remedy != "" {
			fmt.Fprintf(w, "\t\t\t- to do: %s\n", f.Remedy)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	verdict := "podshim can run here."
	if !r.CanRun {
		verdict = "podshim cannot run here."
	}
	fmt.Fprintf(&text, "\n%s %d failures, %d warnings.\n", verdict, r.Count(Failure), r.Count(Warning))
	_, err := io.WriteString(out, text.String())
	return err
}

func ok(name, format string, args ...any) Finding {
	return Finding{Name: name, Level: OK, Found: fmt.Sprintf(format, args...)}
}

func warning(name, found, consequence, remedy string) Finding {
	return Finding{Name: name, Level: Warning, Found: found, Consequence: consequence, Remedy: remedy}
}

func failure(name, found, consequence, remedy string) Finding {
	return Finding{Name: name, Level: Failure, Found: found, Consequence: consequence, Remedy: remedy}
}

// need is ok when err is nil and a failure otherwise.
func need(name string, err error, consequence, remedy string) Finding {
	if err == nil {
		return ok(name, "works")
	}
	return failure(name, err.Error(), consequence, remedy)
}

// want is ok when err is nil and a warning otherwise.
func want(name string, err error, consequence, remedy string) Finding {
	f := need(name, err, consequence, remedy)
	if f.Level == Failure {
		f.Level = Warning
	}
	return f
}

// unless is ok when it holds and a warning otherwise.
func unless(name string, holds bool, found, consequence, remedy string) Finding {
	if holds {
		return ok(name, "%s", found)
	}
	return warning(name, found, consequence, remedy)
}
