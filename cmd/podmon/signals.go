package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sigAction is the kernel's struct sigaction, as rt_sigaction(2) has it on amd64
// and arm64: the C library's is another.
type sigAction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

// sigIgnore is SIG_IGN.
const sigIgnore = 1

// defaultSignals gives the default action back to every signal that whoever
// started us has left ignored, since containers would inherit that: nohup ignores
// SIGHUP, by which servers are told to reload; GNU make leaves the C library's
// own two signals ignored. Go tells of neither, and knows nothing of the last two.
func defaultSignals() {
	for sig := uintptr(1); sig <= 64; sig++ {
		var action sigAction
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&action)), unsafe.Sizeof(action.mask), 0, 0)
		if errno != 0 || action.handler != sigIgnore {
			continue
		}
		// The zero value is SIG_DFL. It fails for none that can be ignored.
		action = sigAction{}
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action.mask), 0, 0)
	}
}
