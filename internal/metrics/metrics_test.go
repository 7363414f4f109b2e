package metrics

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

func TestScrape(t *testing.T) {
	m := New(Sources{
		Pods:       func() map[string]int { return map[string]int{"ready": 3} },
		Containers: func() map[string]int { return map[string]int{"running": 5, "exited": 2} },
		Podmons:    func() uint64 { return 7 }, Version: "v1",
	})
	info := &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/Version"}
	for _, err := range []error{nil, nil, grpcstatus.Error(codes.NotFound, "x")} {
		if _, got := m.Unary(t.Context(), nil, info, func(context.Context, any) (any, error) { return nil, err }); !errors.Is(got, err) {
			t.Errorf("error %v became %v", err, got)
		}
	}
	if err := m.Stream(nil, nil, &grpc.StreamServerInfo{FullMethod: "/a/Events"}, func(any, grpc.ServerStream) error { return nil }); err != nil {
		t.Error(err)
	}
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`podshim_cri_call_duration_seconds_count{code="OK",method="Version"} 2`,
		`podshim_cri_call_duration_seconds_count{code="NotFound",method="Version"} 1`,
		`podshim_cri_call_duration_seconds_count{code="OK",method="Events"} 1`,
		`podshim_pods{state="ready"} 3`, `podshim_containers{state="exited"} 2`,
		`podshim_podmon_starts_total 7`, `podshim_build_info{version="v1"} 1`, `go_goroutines`, `process_resident_memory_bytes`,
	} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("a scrape lacks %s", want)
		}
	}
}
