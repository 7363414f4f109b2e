package main

import (
	"context"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/config"
)

// serve runs until ctx ends.
func serve(ctx context.Context, cfg *config.Config, log *logrus.Logger) error {
	log.WithField("socket", cfg.CRI.Socket).Info("started")
	<-ctx.Done()
	return nil
}
