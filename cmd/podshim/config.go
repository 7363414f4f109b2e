package main

import (
	"github.com/spf13/cobra"

	"github.com/podshim/podshim/internal/config"
)

// newConfigCommand builds `podshim config` and what is below it.
func newConfigCommand(s *settings) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the configuration",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "default",
		Short: "Print a configuration file with every key, its meaning and its default",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(config.DefaultFile())
			return err
		},
	}, &cobra.Command{
		Use:   "show",
		Short: "Print the configuration that podshim would run with",
		Long: `Print the configuration that podshim would run with: the defaults, the
configuration file and the flags together, with everything derived filled in.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			out, err := cfg.TOML()
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(out)
			return err
		},
	})
	return cmd
}
