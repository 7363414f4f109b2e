package main

import (
	"fmt"
	"html"
	"os"
	"runtime"
	"slices"
	"strings"
)

// charted are the rows that the chart shows: those that a node pays for most.
var charted = []string{
	"pod up", "ExecSync true", "stop + remove container", "pod down", "CPU time of a pod up + down", "all pods up",
	"memory per pod", "CPU time a second, idle under kubelet's polling", "memory before the first pod",
	"pull of 300 MB in ten layers", "pull of 300 MB in one layer",
}

// chart draws, for each charted row, a bar for each runtime but the first: how many
// times as much as the first's it is. Scales are linear and cut off.
func (r *report) chart(subjects []*subject) string {
	const (
		text, width, bar, gap = 430, 420, 14, 10
		most                  = 12.0 // ratio at the right end
	)
	colours := []string{"#3b6ea8", "#c8792c", "#5a9b57", "#8b5fa8"}
	var b strings.Builder
	y := 40
	for _, sec := range r.sections {
		for _, one := range sec.rows {
			if !slices.Contains(charted, one.name) || len(one.values[subjects[0]]) == 0 {
				continue
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", text-8, y+bar, html.EscapeString(shorten(sec.name, one.name)))
			base := quantile(one.values[subjects[0]], 0.5)
			for i, s := range subjects[1:] {
				if len(one.values[s]) == 0 || base <= 0 {
					continue
				}
				ratio := quantile(one.values[s], 0.5) / base
				length := int(min(ratio, most) / most * width)
				fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/><text x="%d" y="%d">%.1f</text>`+"\n",
					text, y, length, bar, colours[i%len(colours)], text+length+4, y+bar-3, ratio)
				y += bar + 1
			}
			y += gap
		}
	}
	one := text + int(width/most)
	var legend strings.Builder
	for i, s := range subjects[1:] {
		fmt.Fprintf(&legend, `<rect x="%d" y="8" width="12" height="12" fill="%s"/><text x="%d" y="19">%s %s</text>`+"\n",
			220+i*220, colours[i%len(colours)], 220+i*220+16, html.EscapeString(s.name), html.EscapeString(s.version))
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
<text x="8" y="19">times as much as %s (the line)</text>
%s<line x1="%d" y1="30" x2="%d" y2="%d" stroke="black"/>
%s</svg>
`, text+width+60, y, html.EscapeString(subjects[0].name), legend.String(), one, one, y-gap, b.String())
}

// shorten joins a section's and a row's name.
func shorten(section, row string) string {
	if section == "images" || section == "idle" {
		return row
	}
	return row + " (" + section + ")"
}

func cpus() int { return runtime.NumCPU() }

// cgroupLayout says how the machine's cgroups are mounted.
func cgroupLayout() string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "cgroup v2"
	}
	return "cgroup v1"
}
