package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"syscall"
	"time"

	"github.com/podshim/podshim/internal/config"
)

// adminSocket is where a daemon answers podshim's own commands (doctor, explain),
// in the run directory: HTTP with JSON, for root only.
const adminSocket = "admin.sock"

// openAdmin serves podshim's own commands beside CRI.
func (d *parts) openAdmin(context.Context) error {
	listener, err := openSocket(d.run(adminSocket), 0, 0o600)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /doctor", func(w http.ResponseWriter, r *http.Request) {
		report, err := d.examine(r.Context(), examination{repair: r.FormValue("repair") == "true", contents: r.FormValue("contents") == "true"})
		answer(w, report, err)
	})
	mux.HandleFunc("POST /explain", func(w http.ResponseWriter, r *http.Request) {
		explained, err := d.explain(r.FormValue("what"))
		answer(w, explained, err)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	d.events.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			d.log.WithError(err).Error("serve podshim's own commands")
		}
	})
	d.onClose(within(server.Shutdown))
	return nil
}

// refusal is an error's form on the admin socket.
type refusal struct {
	Error string `json:"error"`
}

func answer(w http.ResponseWriter, body any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		body = refusal{err.Error()}
	}
	_ = json.NewEncoder(w).Encode(body) // the client has gone
}

// askDaemon has the running daemon answer a command.
func askDaemon(ctx context.Context, cfg *config.Config, command string, args url.Values, body any) error {
	socket := filepath.Join(cfg.Run, adminSocket)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://podshim/"+command+"?"+args.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("no podshim runs on %s: start it, or give %s its --config or --run", cfg.Run, command)
	}
	if err != nil {
		return fmt.Errorf("ask podshim on %s: %w", socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var no refusal
		if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&no); err != nil || no.Error == "" {
			return fmt.Errorf("podshim answers %s to %s: is it an older version?", resp.Status, command)
		}
		return errors.New(no.Error)
	}
	return json.NewDecoder(resp.Body).Decode(body)
}
