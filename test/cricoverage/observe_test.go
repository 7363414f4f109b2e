package cricoverage

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// observer notes which calls were answered and which fields were in messages: in a
// request that was accepted, or refused by an error that names the field, or in an
// answer.
type observer struct {
	mu       sync.Mutex
	answered map[string]bool
	refused  map[string]bool // calls that are Unimplemented and say what is missing
	fields   map[string]bool // "Message.field"
}

func newObserver() *observer {
	return &observer{answered: map[string]bool{}, refused: map[string]bool{}, fields: map[string]bool{}}
}

// dial connects to a runtime; every message on the way is looked at.
func (o *observer) dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := invoke(ctx, method, req, reply, cc, opts...)
			o.called(method, req, reply, err)
			return err
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := open(ctx, desc, cc, method, opts...)
			return &observed{s, o, method}, err
		}))
}

// observed is a stream of answers.
type observed struct {
	grpc.ClientStream
	o      *observer
	method string
}

func (s *observed) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	if err == nil {
		s.o.mark(m.(proto.Message).ProtoReflect())
	}
	return err
}

func (s *observed) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		s.o.called(s.method, nil, m, nil)
	}
	return err
}

func (o *observer) called(method string, req, reply any, err error) {
	name := path.Base(method)
	switch grpcstatus.Code(err) {
	case codes.OK:
		o.mu.Lock()
		o.answered[name] = true
		o.mu.Unlock()
		if req != nil {
			o.mark(req.(proto.Message).ProtoReflect())
		}
		o.mark(reply.(proto.Message).ProtoReflect())
	case codes.InvalidArgument, codes.FailedPrecondition, codes.Unimplemented:
		message := grpcstatus.Convert(err).Message()
		o.markNamed(req.(proto.Message).ProtoReflect(), message)
		// gRPC itself says "method X not implemented", of a call that nobody serves.
		if grpcstatus.Code(err) == codes.Unimplemented && !strings.HasPrefix(message, "method ") {
			o.mu.Lock()
			o.refused[name] = true
			o.mu.Unlock()
		}
	}
}

// mark notes every field that is set in a message.
func (o *observer) mark(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		o.mu.Lock()
		o.fields[key(f)] = true
		o.mu.Unlock()
		each(f, v, o.mark)
		return true
	})
}

var word = regexp.MustCompile(`\w+`)

// markNamed notes the fields that are set and that an error's message names, with
// all below them.
func (o *observer) markNamed(m protoreflect.Message, message string) {
	words := word.FindAllString(message, -1)
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		below := func(m protoreflect.Message) { o.markNamed(m, message) }
		// "config" and "linux" are in most paths: the last field of a path is what
		// is refused.
		if slices.Contains(words, string(f.Name())) && !slices.Contains([]protoreflect.Name{"config", "linux", "security_context", "resources"}, f.Name()) {
			o.mu.Lock()
			o.fields[key(f)] = true
			o.mu.Unlock()
			below = o.mark
		}
		each(f, v, below)
		return true
	})
}

// each visits the messages in a field.
func each(f protoreflect.FieldDescriptor, v protoreflect.Value, visit func(protoreflect.Message)) {
	switch {
	case f.Message() == nil || f.IsMap():
	case f.IsList():
		for i := range v.List().Len() {
			visit(v.List().Get(i).Message())
		}
	default:
		visit(v.Message())
	}
}

func key(f protoreflect.FieldDescriptor) string {
	return fmt.Sprintf("%s.%s", f.Parent().Name(), f.Name())
}
