package monitor

import "github.com/podshim/podshim/internal/monitor/wire"

// The messages are the wire's own; see there for their fields.
type (
	StartRequest  = wire.StartRequest
	Process       = wire.Process
	Exit          = wire.Exit
	Status        = wire.Status
	Event         = wire.Event
	ExecRequest   = wire.ExecRequest
	AttachRequest = wire.AttachRequest
)

// KillAll is the Signal target that means every process of the container, not
// PID 1 alone.
const KillAll = true
