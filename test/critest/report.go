package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// spec is one spec of ginkgo's JSON report; times are in nanoseconds.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct {
		Message  string
		Location struct {
			FileName   string
			LineNumber int
		}
	}
}

func (s spec) name() string {
	return strings.Join(append(append([]string{}, s.ContainerHierarchyTexts...), s.LeafNodeText), " ")
}

// result is one run of critest.
type result struct {
	specs []spec
	took  time.Duration
}

// readReport reads ginkgo's JSON report.
func readReport(path string) (result, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return result{}, fmt.Errorf("read critest's report: %w", err)
	}
	var suites []struct {
		SpecReports []spec
		RunTime     time.Duration
	}
	if err := json.Unmarshal(data, &suites); err != nil {
		return result{}, fmt.Errorf("parse critest's report: %w", err)
	}
	var r result
	for _, suite := range suites {
		r.specs = append(r.specs, suite.SpecReports...)
		r.took += suite.RunTime
	}
	return r, nil
}

// tally counts what the specs came to. Specs outside the focus count nowhere.
type tally struct {
	passed, failed, skipped int
	// problems are the failures, and the skips without a reason.
	problems []string
	took     time.Duration
}

func (t *tally) add(other tally) {
	t.passed += other.passed
	t.failed += other.failed
	t.skipped += other.skipped
	t.problems = append(t.problems, other.problems...)
	t.took += other.took
}

// count judges a result. Skips are judged only for a whole suite: with a focus
// everything else is skipped.
func (r result) count(whole bool) tally {
	t := tally{took: r.took}
	for _, s := range r.specs {
		switch s.State {
		case "passed":
			if s.LeafNodeType == "It" {
				t.passed++
			}
		case "skipped", "pending":
			if !whole {
				continue
			}
			t.skipped++
			if _, ok := reasonFor(s.name()); !ok {
				t.problems = append(t.problems, fmt.Sprintf("skipped without a reason of ours: %s: %s", s.name(), s.Failure.Message))
			}
		default:
			t.failed++
			t.problems = append(t.problems, fmt.Sprintf("%s: %s\n    %s\n    %s:%d", s.State, s.name(),
				strings.ReplaceAll(strings.TrimSpace(s.Failure.Message), "\n", "\n    "),
				s.Failure.Location.FileName, s.Failure.Location.LineNumber))
		}
	}
	return t
}

// slowest lists the specs that took longest, for the report.
func (r result) slowest(n int) []spec {
	specs := append([]spec{}, r.specs...)
	for i := 0; i < len(specs) && i < n; i++ {
		for j := i + 1; j < len(specs); j++ {
			if specs[j].RunTime > specs[i].RunTime {
				specs[i], specs[j] = specs[j], specs[i]
			}
		}
	}
	return specs[:min(n, len(specs))]
}
