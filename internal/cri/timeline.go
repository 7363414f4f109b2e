package cri

import (
	"context"
	"path"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/timeline"
)

// begin remembers a call that makes something; the function returned ends it.
func begin(ctx context.Context, book *timeline.Book, method string, req any) (context.Context, func(error)) {
	var about timeline.Subject
	var pod *runtime.PodSandboxMetadata
	switch r := req.(type) {
	case *runtime.RunPodSandboxRequest:
		pod = r.GetConfig().GetMetadata()
	case *runtime.CreateContainerRequest:
		pod = r.GetSandboxConfig().GetMetadata()
		about.ID = r.GetPodSandboxId()
		about.Container, about.Image = r.GetConfig().GetMetadata().GetName(), r.GetConfig().GetImage().GetImage()
	case *runtime.StartContainerRequest:
		about.ID = r.GetContainerId()
	case *runtime.PullImageRequest:
		pod = r.GetSandboxConfig().GetMetadata()
		about.Image = r.GetImage().GetImage()
	default:
		return ctx, func(error) {}
	}
	about.Namespace, about.Pod = pod.GetNamespace(), pod.GetName()
	return book.Begin(ctx, path.Base(method), about)
}
