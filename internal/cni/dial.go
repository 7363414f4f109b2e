package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dialLimit bounds one Dial whose caller sets no deadline.
const dialLimit = 15 * time.Second

// Dial connects to a TCP port on localhost inside the network namespace at
// netnsPath ("": the host's): 127.0.0.1 first, then ::1. It is how port-forward
// reaches a pod, with nothing needed in the pod's images. The connection is a
// *net.TCPConn, so that either direction can be closed alone, and works outside
// the namespace like any other.
//
// Errors: errdefs.ErrInvalidArgument for another network than "tcp" or a port
// outside 1-65535, errdefs.ErrNotFound without such a namespace,
// errdefs.ErrUnavailable when nobody listens, the context's own.
func Dial(ctx context.Context, netnsPath, network string, port int) (net.Conn, error) {
	if network != "tcp" {
		return nil, fmt.Errorf("dial pod: network %q (only tcp): %w", network, errdefs.ErrInvalidArgument)
	}
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("dial pod: port %d is not in 1-65535: %w", port, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	var refusals []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := dialOne(ctx, netnsPath, net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("dial pod: %w", errors.Join(err, ctx.Err()))
		}
		if !nobodyThere(err) {
			return nil, fmt.Errorf("dial pod: %w", err)
		}
		refusals = append(refusals, err)
	}
	return nil, fmt.Errorf("nothing listens on port %d of the pod: %w: %w", port, errors.Join(refusals...), errdefs.ErrUnavailable)
}

// dialOne connects with a socket that is made inside the namespace. A literal
// address makes net.Dialer call socket(2) on the calling goroutine.
func dialOne(ctx context.Context, netnsPath, addr string) (conn net.Conn, err error) {
	err = Do(netnsPath, func() error {
		var d net.Dialer
		d.SetMultipathTCP(false)
		conn, err = d.DialContext(ctx, "tcp", addr)
		return err
	})
	return conn, err
}

// nobodyThere: the other localhost address may still answer. The address errors
// are those of a namespace without IPv6 (or IPv4).
func nobodyThere(err error) bool {
	for _, e := range []error{unix.ECONNREFUSED, unix.EADDRNOTAVAIL, unix.ENETUNREACH, unix.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
