package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// screen is what the reader sees; in colour where it is a terminal.
type screen struct {
	out    *os.File
	colour bool
}

func newScreen(out *os.File) screen {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return screen{out: out, colour: err == nil && os.Getenv("NO_COLOR") == ""}
}

// paint wraps text into an SGR sequence.
func (s screen) paint(code, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s screen) title(text string) {
	fmt.Fprintf(s.out, "\n%s\n", s.paint("1", text))
}

func (s screen) step(text string) {
	fmt.Fprintf(s.out, "\n%s %s\n", s.paint("1;36", "▸"), s.paint("1", text))
}

func (s screen) fact(name, text string) {
	fmt.Fprintf(s.out, "  %-9s %s\n", name, s.paint("2", text))
}

// longID is a container's or image's ID in full, which nobody wants to read.
var longID = regexp.MustCompile(`\b([0-9a-f]{13})[0-9a-f]{51}\b`)

func (s screen) command(name string, args []string) {
	line := name + " " + longID.ReplaceAllString(strings.Join(args, " "), "$1")
	fmt.Fprintf(s.out, "  %s %s\n", s.paint("32", "$"), line)
}

// gap is what crictl puts between the columns of a table.
var gap = regexp.MustCompile(` {2,}`)

// output prints what a command said; a table of crictl's is set closer.
func (s screen) output(text string) {
	if strings.HasPrefix(text, "CONTAINER ") || strings.HasPrefix(text, "POD ID ") {
		var rows [][]string
		for line := range strings.Lines(text) {
			rows = append(rows, gap.Split(strings.TrimRight(line, " \n"), -1))
		}
		s.table(rows)
		return
	}
	for line := range strings.Lines(text) {
		line = longID.ReplaceAllString(strings.TrimRight(line, " \n"), "$1")
		fmt.Fprintf(s.out, "    %s\n", s.paint("2", line))
	}
}

// table prints rows in columns; its last row is the sum of what is above.
func (s screen) table(rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for i, row := range rows {
		var line strings.Builder
		for j, cell := range row {
			padded := cell + strings.Repeat(" ", widths[j]-utf8.RuneCountInString(cell)+2)
			switch {
			case i == 0:
				padded = s.paint("2", padded)
			case cell == "shared":
				padded = s.paint("1;32", padded)
			case cell == "own":
				padded = s.paint("1;33", padded)
			}
			line.WriteString(padded)
		}
		fmt.Fprintf(s.out, "    %s\n", strings.TrimRight(line.String(), " "))
	}
}

// check prints one thing looked for, and what was found of it.
func (s screen) check(what string, found []string) {
	if len(found) == 0 {
		fmt.Fprintf(s.out, "  %s no %s\n", s.paint("32", "✓"), what)
		return
	}
	fmt.Fprintf(s.out, "  %s %s: %s\n", s.paint("31", "✗"), what, strings.Join(found, ", "))
}

func (s screen) done(text string) {
	fmt.Fprintf(s.out, "\n%s\n\n", s.paint("1", text))
}
