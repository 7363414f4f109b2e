package cri

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("plain"), codes.Unknown},
		{fmt.Errorf("field: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{fmt.Errorf("pod: %w", errdefs.ErrNotFound), codes.NotFound},
		{fmt.Errorf("name: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{fmt.Errorf("state: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{fmt.Errorf("podmon: %w", errdefs.ErrUnavailable), codes.Unavailable},
		{fmt.Errorf("class: %w", errdefs.ErrNotImplemented), codes.Unimplemented},
		{fmt.Errorf("blob: %w", errdefs.ErrDataLoss), codes.DataLoss},
		{fmt.Errorf("registry: %w", errdefs.ErrUnauthenticated), codes.Unauthenticated},
		{fmt.Errorf("write: %w", unix.ENOSPC), codes.ResourceExhausted},
		// A target that is no running container of the pod is a bad argument,
		// whatever else it is.
		{fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, errdefs.ErrNotFound), codes.InvalidArgument},
		// The caller's time was over: what that led to is not the cause.
		{errors.Join(fmt.Errorf("plugin: %w", errdefs.ErrUnavailable), context.DeadlineExceeded), codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{grpcstatus.Error(codes.Aborted, "as it is"), codes.Aborted},
	} {
		if got := grpcstatus.Code(status(tc.err)); got != tc.want {
			t.Errorf("%v: code %s, want %s", tc.err, got, tc.want)
		}
		if tc.err != nil && grpcstatus.Convert(status(tc.err)).Message() == "" {
			t.Errorf("%v: no message", tc.err)
		}
	}
}
