package monitor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// program is podmon's program, sealed, and how the file looked that it is a copy of.
// It is kept for the next podmon, which containers wait for; it takes no memory that
// a running one does not take.
type program struct {
	sealed *os.File
	build  string
	of     unix.Stat_t
}

// isOf tells whether a file is still the one that was copied.
func (p *program) isOf(st unix.Stat_t) bool {
	return p != nil && p.of.Dev == st.Dev && p.of.Ino == st.Ino && p.of.Size == st.Size && p.of.Mtim == st.Mtim && p.of.Ctim == st.Ctim
}

// sealedProgram returns Options.Binary as it is now. upgrading is held.
func (m *Monitor) sealedProgram() (*program, error) {
	var st unix.Stat_t
	err := unix.Stat(m.o.Binary, &st)
	if err != nil && m.program != nil {
		m.log.WithError(err).Warn("podmon's program is gone: the last one is started again")
		return m.program, nil
	}
	if err != nil {
		return nil, fmt.Errorf("podmon: look at %s: %w", m.o.Binary, err)
	}
	if m.program.isOf(st) {
		return m.program, nil
	}
	f, build, err := seal(m.o.Binary)
	if err != nil {
		return nil, err
	}
	m.keepProgram(&program{f, build, st})
	return m.program, nil
}

// borrowProgram keeps what the current podmon runs, which st and build are of.
func (m *Monitor) borrowProgram(podmon Process, build string, st unix.Stat_t) {
	// It is its memfd, and so it is sealed.
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", podmon.PID))
	if err == nil && !podmon.Alive() { // the file may be of another process that got its PID
		f.Close()
		err = unix.ESRCH
	}
	if err != nil {
		m.log.WithError(err).Debug("open the program of podmon")
		return // it will be copied when it is needed
	}
	m.keepProgram(&program{f, build, st})
}

func (m *Monitor) keepProgram(p *program) {
	if m.program != nil {
		m.program.sealed.Close()
	}
	m.program = p
}
