package cri

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

// classes is the one table from errors to gRPC codes. The first class that an
// error has decides: the caller's own deadline stands above what it led to.
var classes = []struct {
	is   func(error) bool
	code codes.Code
}{
	{is(context.DeadlineExceeded), codes.DeadlineExceeded},
	{is(context.Canceled), codes.Canceled},
	{errdefs.IsInvalidArgument, codes.InvalidArgument},
	{errdefs.IsAlreadyExists, codes.AlreadyExists},
	{errdefs.IsNotImplemented, codes.Unimplemented},
	{errdefs.IsUnauthorized, codes.Unauthenticated},
	{errdefs.IsPermissionDenied, codes.PermissionDenied},
	{errdefs.IsResourceExhausted, codes.ResourceExhausted},
	{is(unix.ENOSPC), codes.ResourceExhausted},
	{is(unix.EDQUOT), codes.ResourceExhausted},
	{errdefs.IsFailedPrecondition, codes.FailedPrecondition},
	{errdefs.IsNotFound, codes.NotFound},
	{errdefs.IsUnavailable, codes.Unavailable},
	{errdefs.IsDataLoss, codes.DataLoss},
	{errdefs.IsAborted, codes.Aborted},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// status gives an error its gRPC code; what has none is Unknown, as kubelet
// expects of a runtime's own failures.
func status(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := grpcstatus.FromError(err); ok {
		return err
	}
	return grpcstatus.Error(codeOf(err), err.Error())
}

func codeOf(err error) codes.Code {
	if s, ok := grpcstatus.FromError(err); ok {
		return s.Code()
	}
	for _, c := range classes {
		if c.is(err) {
			return c.code
		}
	}
	return codes.Unknown
}

// levelOf is how loud an error is: a caller's mistake is the caller's to hear,
// a failure of the runtime is the operator's too.
func levelOf(err error) logrus.Level {
	switch codeOf(err) {
	case codes.NotFound, codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition, codes.Unimplemented, codes.Canceled:
		return logrus.DebugLevel
	case codes.DeadlineExceeded, codes.Unauthenticated, codes.PermissionDenied:
		return logrus.WarnLevel
	default:
		return logrus.ErrorLevel
	}
}
