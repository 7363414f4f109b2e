package streaming

import (
	"context"
	stdlog "log"
	"log/slog"
	"strings"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// RouteKlog sends what the Kubernetes libraries log to log, at level debug:
// they report as errors what clients do (leaving, mostly), and what matters
// comes back to the caller as an error anyway. It sets the process's one klog,
// so the program calls it once, before Listen.
func RouteKlog(log logrus.FieldLogger) {
	klog.SetSlogLogger(slog.New(toLogrus{log}))
}

// toLogrus is a slog.Handler that writes debug lines.
type toLogrus struct{ log logrus.FieldLogger }

// Enabled implements slog.Handler; klog's verbose levels are below Info.
func (h toLogrus) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

// Handle implements slog.Handler.
func (h toLogrus) Handle(_ context.Context, r slog.Record) error {
	fields := logrus.Fields{}
	r.Attrs(func(a slog.Attr) bool {
		fields[a.Key] = a.Value.String()
		return true
	})
	h.log.WithFields(fields).Debug(r.Message)
	return nil
}

// WithAttrs implements slog.Handler.
func (h toLogrus) WithAttrs(attrs []slog.Attr) slog.Handler {
	fields := logrus.Fields{}
	for _, a := range attrs {
		fields[a.Key] = a.Value.String()
	}
	return toLogrus{h.log.WithFields(fields)}
}

// WithGroup implements slog.Handler; debug lines do without groups.
func (h toLogrus) WithGroup(string) slog.Handler { return h }

// errorLog is the same for net/http's logger.
func errorLog(log logrus.FieldLogger) *stdlog.Logger {
	return stdlog.New(lineWriter{log}, "", 0)
}

type lineWriter struct{ log logrus.FieldLogger }

func (w lineWriter) Write(p []byte) (int, error) {
	w.log.Debug(strings.TrimSpace(string(p)))
	return len(p), nil
}
