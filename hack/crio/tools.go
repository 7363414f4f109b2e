//go:build tools

// Package tools pins CRI-O, which podshim is measured beside. It is a module of
// its own because CRI-O builds with the requirements of its own go.mod only, which
// are copied here, with its go.sum. `make crio` builds the programs.
package tools

import _ "github.com/cri-o/cri-o/cmd/crio"
