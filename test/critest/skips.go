package main

import "regexp"

// skip is a set of specs that may be skipped here, and why. Those with pass
// set are told to critest; the others critest skips by itself, and how many
// that may be is known.
type skip struct {
	specs  *regexp.Regexp
	reason string
	ask    bool
}

// skips is the whole list. Benchmarks are not specs and run by -benchmark.
var skips = []skip{{
	specs:  regexp.MustCompile(`public image with digest should be pulled and removed`),
	reason: "pins the digest of an image that only the public registry has; internal/image tests pulling by digest",
	ask:    true,
}, {
	specs:  regexp.MustCompile(`AppArmor`),
	reason: "AppArmor is not enabled in this kernel",
}, {
	specs:  regexp.MustCompile(`benchmark about`),
	reason: "a benchmark: make critest-bench",
}}

// reasonFor tells why a spec may be skipped; ok is false when it may not.
func reasonFor(spec string) (reason string, ok bool) {
	for _, s := range skips {
		if s.specs.MatchString(spec) {
			return s.reason, true
		}
	}
	return "", false
}
