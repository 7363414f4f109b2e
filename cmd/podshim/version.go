package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker: -ldflags "-X main.version=v1.2.3". Empty, the
// version Go recorded for the module holds.
var version string

// criVersion is the one CRI version served (CRI VersionResponse.runtime_api_version).
const criVersion = "v1"

// build is what this executable was made from.
type build struct {
	Version, Commit, Go string
}

// thisBuild asks the linker's value and Go's build information.
func thisBuild() build {
	b := build{Version: version, Commit: "unknown", Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b.named()
	}
	if b.Version == "" {
		b.Version = info.Main.Version
	}
	dirty := false
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.modified":
			dirty = s.Value == "true"
		}
	}
	if dirty {
		b.Commit += " with changes"
	}
	return b.named()
}

func (b build) named() build {
	if b.Version == "" || b.Version == "(devel)" {
		b.Version = "devel"
	}
	return b
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of podshim, and what it was built from",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b := thisBuild()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "podshim %s\ncommit  %s\ngo      %s %s/%s\nCRI     %s\n",
				b.Version, b.Commit, b.Go, runtime.GOOS, runtime.GOARCH, criVersion)
			return err
		},
	}
}
