package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/private"
)

// dial connects to a CRI endpoint.
func dial(endpoint string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to runtime: %w", err)
	}
	return conn, nil
}

// onePod runs a pod, stops and removes it with its infra_image, and returns its ID.
func onePod(ctx context.Context, o options, place *private.Place) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := dial(place.Endpoint())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	runtime := cri.NewRuntimeServiceClient(conn)
	answer, err := runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{
		RuntimeHandler: o.handler,
		Config: &cri.PodSandboxConfig{
			Metadata:     &cri.PodSandboxMetadata{Name: "first", Namespace: "critest", Uid: "first"},
			LogDirectory: place.Path("tmp"),
			Linux:        &cri.LinuxPodSandboxConfig{},
		},
	})
	if err != nil {
		return "", err
	}
	id := answer.GetPodSandboxId()
	if _, err := runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return "", err
	}
	if _, err = runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return "", err
	}
	return id, removeImages(ctx, cri.NewImageServiceClient(conn))
}

// emptied asks the runtime whether it believes to be empty after the suite, and
// removes the images, so that what is left of them can be seen. It returns
// what should not have been there.
func emptied(ctx context.Context, endpoint string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := dial(endpoint)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	runtime, images := cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)

	var problems []string
	pods, err := runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, fmt.Errorf("list pods after the suite: %w", err)
	}
	for _, pod := range pods.GetItems() {
		problems = append(problems, fmt.Sprintf("left behind: pod %s (%s)", pod.GetId(), pod.GetMetadata().GetName()))
	}
	containers, err := runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list containers after the suite: %w", err)
	}
	for _, c := range containers.GetContainers() {
		problems = append(problems, fmt.Sprintf("left behind: container %s (%s)", c.GetId(), c.GetMetadata().GetName()))
	}
	return problems, removeImages(ctx, images)
}

// removeImages removes all images, an infra_image too: pulled once more by a pod
// it would have other files than before.
func removeImages(ctx context.Context, images cri.ImageServiceClient) error {
	list, err := images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	for _, image := range list.GetImages() {
		_, err := images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image.GetId()}})
		if err != nil {
			return fmt.Errorf("remove image %v: %w", image.GetRepoTags(), err)
		}
	}
	return nil
}
