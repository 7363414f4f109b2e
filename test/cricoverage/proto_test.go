package cricoverage

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// api is the CRI as its descriptors have it.
type api struct {
	methods []protoreflect.MethodDescriptor
	// messages are those that a client on Linux can send or get, in the order of
	// the .proto file; requests and responses tell which way they go (both, some).
	messages            []protoreflect.MessageDescriptor
	requests, responses map[protoreflect.FullName]bool
}

// platform tells whether a field leads to another operating system's part of the
// API: what is below is never sent to podshim without being refused.
func platform(f protoreflect.FieldDescriptor) bool {
	return f.Message() != nil && strings.HasPrefix(string(f.Message().Name()), "Windows")
}

func readAPI() api {
	a := api{requests: map[protoreflect.FullName]bool{}, responses: map[protoreflect.FullName]bool{}}
	file := cri.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto
	for i := range file.Services().Len() {
		methods := file.Services().Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			a.methods = append(a.methods, m)
			reach(m.Input(), a.requests)
			reach(m.Output(), a.responses)
		}
	}
	for i := range file.Messages().Len() {
		m := file.Messages().Get(i)
		if a.requests[m.FullName()] || a.responses[m.FullName()] {
			a.messages = append(a.messages, m)
		}
	}
	return a
}

// reach marks a message and what its fields lead to.
func reach(m protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) {
	if seen[m.FullName()] || m.IsMapEntry() {
		return
	}
	seen[m.FullName()] = true
	for i := range m.Fields().Len() {
		if f := m.Fields().Get(i); f.Message() != nil && !platform(f) {
			reach(f.Message(), seen)
		}
	}
}

// wrapped tells whether a message only stands for "a value or none": its field is
// its parent's.
func wrapped(m protoreflect.MessageDescriptor) bool {
	return slices.Contains([]protoreflect.Name{"Int64Value", "UInt64Value"}, m.Name())
}
