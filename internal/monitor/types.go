package monitor

import (
	"os"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// The messages are the wire's own; see there for their fields.
type (
	StartRequest = wire.StartRequest
	Process      = wire.Process
	Exit         = wire.Exit
	Status       = wire.Status
	Event        = wire.Event
	ExecRequest  = wire.ExecRequest
)

// AttachRequest copies a running container's output to the given write ends
// until the container ends or the reader goes away. A reader that is slower
// than the container is cut off; the container never waits for it.
type AttachRequest struct {
	ContainerID string
	Stdout      *os.File // terminal output too
	Stderr      *os.File
	// Attached, if set, is called when everything that the container writes from
	// then on will be copied: the moment to send it input.
	Attached func()
}
