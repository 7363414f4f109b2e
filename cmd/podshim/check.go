package main

import (
	"encoding/json"
	"errors"

	"github.com/spf13/cobra"

	"github.com/podshim/podshim/internal/check"
)

// errCannotRun makes the exit status 1; the findings are printed before.
var errCannotRun = errors.New("this machine cannot run podshim as configured; the failures above say why")

func newCheckCommand(s *settings) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say whether this machine can run podshim, and what to do where not",
		Long: `Look at the kernel, cgroups, privileges, the network, directories, and at what
a podshim that is gone may have left, and say for each miss what follows from it
and what to do. Nothing is changed.

Exit status: 0 when podshim can run (warnings cost a feature each), 1 when not.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			report := check.Run(cmd.Context(), cfg)
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(report)
			} else {
				err = report.WriteTable(cmd.OutOrStdout())
			}
			if err == nil && !report.CanRun {
				err = errCannotRun
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the findings as JSON")
	return cmd
}
