package cri

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
)

// listed is what a node with 400 pods of two containers has.
func listed() []*container.Record {
	records := make([]*container.Record, 800)
	for i := range records {
		records[i] = &container.Record{
			ID: fmt.Sprintf("%064x", i), SandboxID: fmt.Sprintf("%064x", i/2), State: container.Running, StopSignal: syscall.SIGTERM,
			CreatedAt: time.Unix(int64(i), 0), ImageRef: fmt.Sprintf("sha256:%064x", 1), ImageID: fmt.Sprintf("sha256:%064x", 1),
			Config: &runtime.ContainerConfig{
				Metadata: &runtime.ContainerMetadata{Name: "web"},
				Image:    &runtime.ImageSpec{Image: "registry.example/team/web:v1"},
				Labels: map[string]string{
					"io.kubernetes.container.name": "web", "io.kubernetes.pod.name": fmt.Sprintf("web-%d", i/2),
					"io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.uid": fmt.Sprintf("%032x", i/2),
				},
				Annotations: map[string]string{
					"io.kubernetes.container.hash": "1234abcd", "io.kubernetes.container.restartCount": "0",
					"io.kubernetes.container.terminationMessagePath":   "/dev/termination-log",
					"io.kubernetes.container.terminationMessagePolicy": "File",
					"io.kubernetes.pod.terminationGracePeriod":         "30",
				},
			},
		}
	}
	return records
}

// BenchmarkListOf800Containers is a list on such a node, from the records to the
// bytes that go out.
func BenchmarkListOf800Containers(b *testing.B) {
	records := listed()
	b.ReportAllocs()
	for b.Loop() {
		resp := &runtime.ListContainersResponse{}
		for _, r := range records {
			resp.Containers = append(resp.Containers, listedContainer(r))
		}
		raw, err := proto.Marshal(resp)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(raw)))
	}
}

// BenchmarkContainerStatus is the status of one of them.
func BenchmarkContainerStatus(b *testing.B) {
	s := &runtimeService{}
	r := listed()[0]
	b.ReportAllocs()
	for b.Loop() {
		if _, err := proto.Marshal(&runtime.ContainerStatusResponse{Status: s.containerStatus(r)}); err != nil {
			b.Fatal(err)
		}
	}
}
