package check

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/doctor"
)

// leftovers has the doctor look for what a podshim that is gone has left. While
// one runs, what it holds is its own.
func leftovers(ctx context.Context, cfg *config.Config) []Finding {
	if answers(ctx, cfg.CRI.Socket) {
		return []Finding{ok("podshim", "running on %s; `podshim doctor` looks beside it", cfg.CRI.Socket)}
	}
	found, err := doctor.Alone(ctx, cfg, false)
	if err != nil {
		return []Finding{warning("leftovers", err.Error(), "whether something is left is not known", "")}
	}
	if len(found) == 0 {
		return []Finding{ok("leftovers", "none")}
	}
	var kinds []doctor.Kind
	names := map[doctor.Kind][]string{}
	why := map[doctor.Kind]string{}
	for _, f := range found {
		if names[f.Kind] == nil {
			kinds = append(kinds, f.Kind)
			why[f.Kind] = f.Why
		}
		names[f.Kind] = append(names[f.Kind], f.Name)
	}
	var findings []Finding
	for _, kind := range kinds {
		findings = append(findings, warning(string(kind), summary(names[kind]), why[kind],
			"podshim doctor says all of it, podshim doctor --repair puts it right"))
	}
	return findings
}

// summary names some of what is left.
func summary(found []string) string {
	const shown = 3
	text := strings.Join(found[:min(shown, len(found))], ", ")
	if len(found) > shown {
		text += fmt.Sprintf(" and %d more", len(found)-shown)
	}
	return fmt.Sprintf("%d left: %s", len(found), text)
}

// answers reports whether somebody listens on a unix socket.
func answers(ctx context.Context, socket string) bool {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
