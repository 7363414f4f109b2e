package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// report gathers what was measured, in the order in which it came.
type report struct {
	mu       sync.Mutex
	sections []*section
}

// section is one table.
type section struct {
	name string
	rows []*row
}

// row is one thing measured, for each runtime as often as it was.
type row struct {
	name, unit string
	values     map[*subject][]float64
}

func (r *report) add(sectionName, rowName, unit string, s *subject, value float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.sections, func(sec *section) bool { return sec.name == sectionName })
	if i < 0 {
		i = len(r.sections)
		r.sections = append(r.sections, &section{name: sectionName})
	}
	sec := r.sections[i]
	j := slices.IndexFunc(sec.rows, func(one *row) bool { return one.name == rowName })
	if j < 0 {
		j = len(sec.rows)
		sec.rows = append(sec.rows, &row{name: rowName, unit: unit, values: map[*subject][]float64{}})
	}
	sec.rows[j].values[s] = append(sec.rows[j].values[s], value)
}

func (r *report) timer(section string, s *subject) timer {
	return func(step string, d time.Duration) { r.add(section, step, "ms", s, ms(d)) }
}

// only drops all steps but one.
func (t timer) only(step string) timer {
	if t == nil {
		return nil
	}
	return func(s string, d time.Duration) {
		if s == step {
			t(s, d)
		}
	}
}

// of says whose steps they are.
func (t timer) of(which string) timer {
	if t == nil {
		return nil
	}
	return func(s string, d time.Duration) { t(s+", "+which, d) }
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the nearest-rank quantile; there is at least one value.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

// cells are a row's line: of each runtime the median, the 99th percentile where
// there is more than one value, and for all but the first the ratio of medians.
func (r *row) cells(subjects []*subject) []string {
	line := []string{r.name + ", " + r.unit}
	first := r.values[subjects[0]]
	for i, s := range subjects {
		values := r.values[s]
		p50, p99, ratio := "", "", ""
		if len(values) > 0 {
			p50 = number(quantile(values, 0.5))
		}
		if len(values) > 1 {
			p99 = number(quantile(values, 0.99))
		}
		if len(values) > 0 && len(first) > 0 {
			ratio = fmt.Sprintf("%.1f", quantile(values, 0.5)/quantile(first, 0.5))
		}
		line = append(line, p50, p99)
		if i > 0 {
			line = append(line, ratio)
		}
	}
	return line
}

func number(v float64) string {
	if v < 10 {
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.1f", v)
}

// measured are those that a section has values of.
func (sec *section) measured(subjects []*subject) []*subject {
	return slices.DeleteFunc(slices.Clone(subjects), func(s *subject) bool {
		return !slices.ContainsFunc(sec.rows, func(one *row) bool { return len(one.values[s]) > 0 })
	})
}

func heads(subjects []*subject) []string {
	line := []string{""}
	for i, s := range subjects {
		line = append(line, s.name, "p99")
		if i > 0 {
			line = append(line, "ratio")
		}
	}
	return line
}

func (r *report) print(to io.Writer, subjects []*subject) {
	for _, sec := range r.sections {
		subjects := sec.measured(subjects)
		fmt.Fprintf(to, "\n%s\n", sec.name)
		w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(w, strings.Join(heads(subjects), "\t")+"\t")
		for _, one := range sec.rows {
			fmt.Fprintln(w, strings.Join(one.cells(subjects), "\t")+"\t")
		}
		w.Flush()
	}
}

// markdown is the report with what it was measured on.
func (r *report) markdown(subjects []*subject, chart string) string {
	var b strings.Builder
	var versions []string
	for _, s := range subjects {
		versions = append(versions, s.name+" "+s.version)
	}
	fmt.Fprintf(&b, "One run, on %s, of %s, on %s. p50 is under the runtime's name; ratios are of medians, to %s.\n\n![Ratios of that run](%s)\n",
		time.Now().Format(time.DateOnly), strings.Join(versions, ", "), machineName(), subjects[0].name, chart)
	for _, sec := range r.sections {
		subjects := sec.measured(subjects)
		fmt.Fprintf(&b, "\n**%s**\n\n| %s |\n|---|%s\n", sec.name, strings.Join(heads(subjects), " | "),
			strings.Repeat("--:|", len(heads(subjects))-1))
		for _, one := range sec.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(one.cells(subjects), " | "))
		}
	}
	return b.String()
}

// machineName says what the figures depend on most.
func machineName() string {
	cpu, kernel := "an unknown CPU", "?"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				cpu = strings.Trim(name, "\t :\n")
				break
			}
		}
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		kernel = unix.ByteSliceToString(uts.Release[:])
	}
	return fmt.Sprintf("%s (%d CPUs), Linux %s, %s", cpu, cpus(), kernel, cgroupLayout())
}

// marks that stand around the bench's part of a file.
const (
	beginMark = "<!-- bench: begin -->\n"
	endMark   = "<!-- bench: end -->\n"
)

// write replaces the bench's part of a Markdown file, and the chart beside it.
func (r *report) write(path string, subjects []*subject) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no part between %q and %q", path, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	chart := strings.TrimSuffix(path, filepath.Ext(path)) + ".svg"
	if err := os.WriteFile(chart, []byte(r.chart(subjects)), 0o644); err != nil {
		return err
	}
	part := r.markdown(subjects, filepath.Base(chart))
	return os.WriteFile(path, []byte(before+beginMark+"\n"+part+"\n"+endMark+after), 0o644)
}
