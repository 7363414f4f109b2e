// "podmon exec": makes a process one of a running container's and executes its program. It
// does what libcontainer's setns init does, but for labels, which come first, for requests that
// ask for nothing else (exec.go); libcontainer starts Go for it, and reads all of the container's
// configuration. "podmon start" does the last part of that in a container's PID 1, which
// libcontainer has made (start.go). One thread, which ends here.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "program.h"

// Descriptors that are given: to exec the pidfd of the container's PID 1, to start its socket
// and the host's /proc.
#define INIT 4
#define START 5
#define HOST_PROC 6

// libcontainer has set all up, as for a program that may do everything: root, with podmon's
// capabilities, unconfined.
static void start(void)
{
	if (dup3(START, ORDER, O_CLOEXEC) < 0)
		_exit(1);
	hide();
	struct order o = take();
	label(HOST_PROC, &o);
	if (syscall(SYS_close_range, ORDER + 1, ~0U, 0) < 0)
		fail("close", "what podmon has given");
	execute(&o);
}

static void exec(void)
{
	hide();
	// Whatever podmon itself was started with; libcontainer does the same.
	if (syscall(SYS_close_range, INIT + 1, ~0U, 0) < 0)
		fail("close", "what podmon was started with");
	struct order o = take();
	adjust(&o);
	if (join_cgroups())
		bear(); // not from inside of the cgroup namespace
	if (setns(INIT, o.r->namespaces) < 0)
		fail("join", "the namespaces");
	close(INIT);
	// Kernels without keys have none to share.
	if (*o.keyring && syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, o.keyring, 0, 0, 0) < 0 && errno != ENOSYS)
		fail("join", "the session keyring");
	// Whoever has CAP_SYS_PTRACE in the container may look into what is in its PID namespace,
	// and can hold it up by a signal: the child has no file, namespace or key of the node's
	// any more. (It has ORDER, on which podmon believes it little; see Started.)
	bear();

	if (setsid() < 0)
		fail("make", "a session");
	execute(&o);
}

void __attribute__((constructor(102))) podmon_exec(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "exec") == 0 && has_order())
		exec();
	if (argc == 2 && strcmp(argv[1], "start") == 0)
		start();
}
