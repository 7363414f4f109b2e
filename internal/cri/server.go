// Package cri serves the Container Runtime Interface, k8s.io/cri-api v1: it turns
// its messages into calls of the packages below and back. What a pod or a
// container is, it does not know.
package cri

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/stats"
	"github.com/podshim/podshim/internal/timeline"
)

// Streaming hands out URLs for exec, attach and port-forward.
type Streaming interface {
	GetExec(*runtime.ExecRequest) (*runtime.ExecResponse, error)
	GetAttach(*runtime.AttachRequest) (*runtime.AttachResponse, error)
	GetPortForward(*runtime.PortForwardRequest) (*runtime.PortForwardResponse, error)
}

// Observer sees calls; *metrics.Metrics is one.
type Observer interface {
	Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error)
	Stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error
}

// Config is what the services are made of.
type Config struct {
	// Version is podshim's own (CRI VersionResponse.runtime_version).
	Version    string
	Sandboxes  *sandbox.Manager
	Containers *container.Manager
	Images     *image.Store
	Network    *cni.Network
	Stats      *stats.Collector
	Streaming  Streaming
	Events     *Events
	// Runtime tells why no container can be started; nil when one can.
	Runtime  func() error
	Host     spec.Host
	Handlers map[string]spec.Handler
	// Timeline remembers how calls went; nil remembers nothing.
	Timeline *timeline.Book
	// Effective is the whole configuration, for verbose Status.
	Effective any
	// Observer sees every call with its code; nil is none.
	Observer Observer
	// MaxMessage is the largest message either way, bytes.
	MaxMessage int
	Log        *logrus.Entry
}

// workers are goroutines that answer calls and stay, with stacks that have grown
// already: a new one's grows anew in each call. When all are busy a call gets a new one.
const workers = 2

// NewServer returns a gRPC server that serves both CRI services.
func NewServer(cfg Config) *grpc.Server {
	options := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(cfg.MaxMessage), grpc.MaxSendMsgSize(cfg.MaxMessage), grpc.NumStreamWorkers(workers),
	}
	if cfg.Observer != nil { // outermost: it wants the codes
		options = append(options, grpc.ChainUnaryInterceptor(cfg.Observer.Unary), grpc.ChainStreamInterceptor(cfg.Observer.Stream))
	}
	s := grpc.NewServer(append(options,
		grpc.ChainUnaryInterceptor(intercept(cfg.Log, cfg.MaxMessage, cfg.Timeline)),
		grpc.ChainStreamInterceptor(interceptStream(cfg.Log)),
	)...)
	runtime.RegisterRuntimeServiceServer(s, &runtimeService{Config: cfg})
	runtime.RegisterImageServiceServer(s, &imageService{Config: cfg})
	return s
}

type runtimeService struct {
	runtime.UnimplementedRuntimeServiceServer
	Config
}

type imageService struct {
	runtime.UnimplementedImageServiceServer
	Config
}

// polling holds the calls that clients make all the time; they are logged at
// level trace, the others at debug.
var polling = map[string]bool{
	runtime.RuntimeService_Version_FullMethodName:                 true,
	runtime.RuntimeService_Status_FullMethodName:                  true,
	runtime.RuntimeService_ListPodSandbox_FullMethodName:          true,
	runtime.RuntimeService_PodSandboxStatus_FullMethodName:        true,
	runtime.RuntimeService_ListContainers_FullMethodName:          true,
	runtime.RuntimeService_ContainerStatus_FullMethodName:         true,
	runtime.RuntimeService_ContainerStats_FullMethodName:          true,
	runtime.RuntimeService_ListContainerStats_FullMethodName:      true,
	runtime.RuntimeService_PodSandboxStats_FullMethodName:         true,
	runtime.RuntimeService_ListPodSandboxStats_FullMethodName:     true,
	runtime.RuntimeService_ListPodSandboxMetrics_FullMethodName:   true,
	runtime.RuntimeService_StreamPodSandboxes_FullMethodName:      true,
	runtime.RuntimeService_StreamContainers_FullMethodName:        true,
	runtime.RuntimeService_StreamContainerStats_FullMethodName:    true,
	runtime.RuntimeService_StreamPodSandboxStats_FullMethodName:   true,
	runtime.RuntimeService_StreamPodSandboxMetrics_FullMethodName: true,
	runtime.ImageService_StreamImages_FullMethodName:              true,
	runtime.RuntimeService_ExecSync_FullMethodName:                true,
	runtime.ImageService_ListImages_FullMethodName:                true,
	runtime.ImageService_ImageStatus_FullMethodName:               true,
	runtime.ImageService_ImageFsInfo_FullMethodName:               true,
}

// intercept logs calls and gives their errors the gRPC code. Requests are never
// logged: they hold environments and credentials.
func intercept(log *logrus.Entry, maxMessage int, book *timeline.Book) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		start := time.Now()
		ctx, end := begin(ctx, book, info.FullMethod, req)
		resp, err := handler(ctx, req)
		end(err)
		if err == nil {
			err = fits(info.FullMethod, resp, maxMessage)
		}
		if err != nil {
			resp = nil
		}
		note(log, info.FullMethod, start, err)
		return resp, status(err)
	}
}

func interceptStream(log *logrus.Entry) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		start := time.Now()
		err := handler(srv, stream)
		note(log, info.FullMethod, start, err)
		return status(err)
	}
}

func note(log *logrus.Entry, method string, start time.Time, err error) {
	level := logrus.DebugLevel
	if polling[method] {
		level = logrus.TraceLevel
	}
	if err != nil {
		level = levelOf(err)
	}
	if !log.Logger.IsLevelEnabled(level) {
		return
	}
	log = log.WithFields(logrus.Fields{"method": method, "took": time.Since(start).Round(time.Microsecond).String()})
	if err != nil {
		log.WithError(err).Log(level, "call failed")
		return
	}
	log.Log(level, "call")
}
