// Package metrics are podshim's own metrics, for Prometheus: what it was asked for
// and how long it took, what it holds, and how often it had to start a podmon.
// (Those of pods and containers are the CRI's, package stats.)
package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	grpcstatus "google.golang.org/grpc/status"
)

// Sources are asked when somebody scrapes. They must not block.
type Sources struct {
	// Pods and Containers count by state.
	Pods, Containers func() map[string]int
	// Podmons is how many podmons this daemon has started.
	Podmons func() uint64
	// Version is podshim's.
	Version string
}

// Metrics collects and serves. Its methods may be called from any goroutine.
type Metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
}

// New registers all families.
func New(s Sources) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "podshim_cri_call_duration_seconds",
			Help: "Time that CRI calls took, by method and gRPC code; image pulls are the method PullImage.",
			// A list answers within a millisecond, a pull may take minutes.
			Buckets: []float64{.001, .005, .025, .1, .25, .5, 1, 2.5, 5, 10, 30, 120, 600},
		}, []string{"method", "code"}),
	}
	m.registry.MustRegister(
		m.calls,
		&states{prometheus.NewDesc("podshim_pods", "Pod sandboxes by state.", []string{"state"}, nil), s.Pods},
		&states{prometheus.NewDesc("podshim_containers", "Containers by state.", []string{"state"}, nil), s.Containers},
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "podshim_podmon_starts_total",
			Help: "podmons that this podshim has started: more than one after an upgrade, or when one died.",
		}, func() float64 { return float64(s.Podmons()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "podshim_build_info", Help: "1, with the version of podshim.",
			ConstLabels: prometheus.Labels{"version": s.Version},
		}, func() float64 { return 1 }),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

// states counts things by state.
type states struct {
	desc  *prometheus.Desc
	count func() map[string]int
}

// Describe implements prometheus.Collector.
func (s *states) Describe(ch chan<- *prometheus.Desc) { ch <- s.desc }

// Collect implements prometheus.Collector.
func (s *states) Collect(ch chan<- prometheus.Metric) {
	for state, n := range s.count() {
		ch <- prometheus.MustNewConstMetric(s.desc, prometheus.GaugeValue, float64(n), state)
	}
}

// Unary times calls. It wants to be outside of what gives errors their code.
func (m *Metrics) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handler(ctx, req)
	m.observe(info.FullMethod, start, err)
	return resp, err
}

// Stream is Unary for streams: the time is that of the whole stream.
func (m *Metrics) Stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	err := handler(srv, stream)
	m.observe(info.FullMethod, start, err)
	return err
}

func (m *Metrics) observe(method string, start time.Time, err error) {
	m.calls.WithLabelValues(path.Base(method), grpcstatus.Code(err).String()).Observe(time.Since(start).Seconds())
}

// ServeHTTP answers a scrape.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}).ServeHTTP(w, r)
}

// Listen serves /metrics at address until the returned function is called, which
// waits for what is being answered.
func (m *Metrics) Listen(address string) (stop func() error, err error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics.address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m)
	const limit = 10 * time.Second
	server := &http.Server{Handler: mux, ReadHeaderTimeout: limit, WriteTimeout: limit, IdleTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		err := server.Shutdown(ctx)
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	}, nil
}
