package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// invalid says what is wrong with a field, by its path in the CRI message.
func invalid(field, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// unable says that this machine cannot do what a field asks for.
func unable(field, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
}
