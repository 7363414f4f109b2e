package main

import (
	"fmt"
	"io"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/podshim/podshim/internal/config"
)

const rootLong = `podshim runs pods for kubelet: it serves the Kubernetes Container Runtime
Interface (CRI v1) on a unix socket.

Without a subcommand it serves until SIGTERM or SIGINT. Containers run on when it
stops, and are known again when it starts: their processes belong to podmon.

Settings come from their defaults, then the configuration file, then flags.
"podshim config default" prints every setting with its meaning.`

const rootExample = `  podshim check                     can this machine run podshim?
  podshim                           serve on /run/podshim/podshim.sock
  podshim config default > /etc/podshim/config.toml
  crictl -r unix:///run/podshim/podshim.sock pods`

// newRoot builds the command with all its subcommands.
func newRoot() *cobra.Command {
	settings := new(settings)
	root := &cobra.Command{
		Use:           "podshim",
		Short:         "A container runtime for Kubernetes pods",
		Long:          rootLong,
		Example:       rootExample,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := settings.load(cmd.Flags())
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, newLogger(cfg, cmd.ErrOrStderr()))
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; %s --help lists them", err, cmd.CommandPath())
	})
	root.CompletionOptions.HiddenDefaultCmd = true
	settings.register(root.PersistentFlags())
	root.AddCommand(newCheckCommand(settings), newDoctorCommand(settings), newExplainCommand(settings), newConfigCommand(settings), newVersionCommand())
	return root
}

// newLogger makes the logger a completed configuration asks for.
func newLogger(cfg *config.Config, out io.Writer) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(out)
	level, err := logrus.ParseLevel(cfg.Log.Level)
	if err != nil {
		panic(fmt.Sprintf("log level %q of a completed configuration: %v", cfg.Log.Level, err))
	}
	log.SetLevel(level)
	// RFC 3339 with nanoseconds, as in the containers' own logs.
	const stamp = "2006-01-02T15:04:05.000000000Z07:00"
	if cfg.Log.Format == "json" {
		log.SetFormatter(&logrus.JSONFormatter{TimestampFormat: stamp})
	} else {
		log.SetFormatter(&logrus.TextFormatter{TimestampFormat: stamp, FullTimestamp: true})
	}
	return log
}
