package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// pullError is a failed pull as callers may see it: a message without secrets,
// and the class of the failure. What it was made from may hold credentials (URLs,
// a registry's answer), so the chain ends here.
type pullError struct {
	message string
	class   error
}

func (e *pullError) Error() string { return e.message }
func (e *pullError) Unwrap() error { return e.class }

// publicError classifies err and cleans its message. A dead registry's message
// begins with what kubelet looks for (cri-api ErrRegistryUnavailable), so
// whoever passes it on must put nothing in front.
func publicError(ctx context.Context, err error, secrets []string) error {
	class := classify(err)
	if cause := context.Cause(ctx); errors.Is(cause, errNoProgress) {
		err, class = fmt.Errorf("%w: %w", err, cause), errdefs.ErrUnavailable
	}
	message := scrub(err.Error(), secrets)
	if errors.Is(class, errdefs.ErrUnavailable) {
		message = crierrors.ErrRegistryUnavailable.Error() + ": " + message
	}
	return &pullError{message, class}
}

// classes that our own checks give; the first that err has is its class.
var ownClasses = []error{
	errdefs.ErrDataLoss, errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented, errdefs.ErrUnauthenticated,
	errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable,
	context.DeadlineExceeded, context.Canceled,
}

func classify(err error) error {
	for _, class := range ownClasses {
		if errors.Is(err, class) {
			return class
		}
	}
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return errdefs.ErrUnauthenticated
	case errors.As(err, &status):
		return classOfStatus(status.StatusCode)
	case errors.Is(err, errdefs.ErrNotFound):
		return errdefs.ErrNotFound
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return errdefs.ErrResourceExhausted
	case isNetwork(err):
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrUnknown
}

func classOfStatus(code int) error {
	switch {
	case code == http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case code == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case code == http.StatusNotFound:
		return errdefs.ErrNotFound
	case code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code >= 500:
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrUnknown
}

func isNetwork(err error) bool {
	var netErr net.Error
	var opErr *net.OpError
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	var unknownCA x509.UnknownAuthorityError
	return errors.As(err, &netErr) || errors.As(err, &opErr) || errors.As(err, &record) ||
		errors.As(err, &cert) || errors.As(err, &unknownCA) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}

var (
	urlQuery    = regexp.MustCompile(`(https?://[^\s"'?]+)\?[^\s"']*`)
	urlUserinfo = regexp.MustCompile(`(https?://)[^\s"'/@]+@`)
)

// scrub removes from a message the given secrets, and the places in URLs where
// others may be: signed queries and user information.
func scrub(message string, secrets []string) string {
	for _, s := range secrets {
		message = strings.ReplaceAll(message, s, "[redacted]")
	}
	message = urlQuery.ReplaceAllString(message, "$1")
	return urlUserinfo.ReplaceAllString(message, "$1")
}
