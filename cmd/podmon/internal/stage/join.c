// Joining cgroups in "podmon init", before libcontainer's C code, which is before Go: one
// thread, still in the host's namespaces.
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "stage.h"

#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

const char *reason(void)
{
	static char text[128]; // Go's words differ in the first letter
	snprintf(text, sizeof(text), "%s", strerror(errno));
	*text = tolower(*text);
	return text;
}

// libcontainer reads the log pipe and makes its lines the error of the start. Where it has
// no part in that, podmon is told over the socket.
void fail(const char *attempt, const char *what)
{
	const char *pipe = getenv("_LIBCONTAINER_LOGPIPE");
	if (!pipe)
		refuse("%s %.6000s: %s", attempt, what, reason());
	char line[8192];
	int n = snprintf(line, sizeof(line), "{\"level\":\"error\",\"msg\":\"%s ", attempt);
	for (; *what && n < 6000; what++)
		line[n++] = (*what == '"' || *what == '\\' || (unsigned char)*what < ' ') ? '?' : *what;
	n += snprintf(line + n, sizeof(line) - n, ": %s\"}\n", reason());
	_exit(write(atoi(pipe), line, n) < 0 ? 2 : 1);
}

void refuse(const char *format, ...)
{
	char line[8000];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (n >= (int)sizeof(line))
		n = sizeof(line) - 1;
	_exit(write(ORDER, line, n) < 0 ? 2 : 1);
}

void leave_it(void)
{
	_exit(send(ORDER, "lib", 3, MSG_NOSIGNAL) < 0 ? 2 : 1);
}

int put(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = write(fd, value, strlen(value));
	int saved = errno;
	close(fd);
	errno = saved;
	return n < 0 ? -1 : 0;
}

// tell answers podmon.
static void tell(int32_t pid)
{
	if (send(ORDER, &pid, sizeof(pid), MSG_NOSIGNAL) != sizeof(pid))
		fail("tell of the move to", "cgroups");
}

// The cgroups v2 of the order, until a child is born.
static struct {
	int fds[2], count;
	bool must; // it may not be born elsewhere
	bool all_cpus;
} births;

// take_cpus allows this process all CPUs that its cpuset has: podmon's own affinity is not
// the container's. Where that cannot be it has podmon's, as by libcontainer.
static void take_cpus(void)
{
	static unsigned char all[8 << 10];
	memset(all, 0xff, sizeof(all));
	if (births.all_cpus)
		syscall(SYS_sched_setaffinity, 0, sizeof(all), all);
}

// spawn makes a child, in the cgroup of the descriptor if there is one. Its parent is podmon,
// whom libcontainer's processes, too, must be children of.
static long spawn(int cgroup)
{
	struct clone_args args = {.flags = CLONE_PARENT};
	if (cgroup < 0)
		return syscall(SYS_clone, CLONE_PARENT, 0, 0, 0, 0);
	args.flags |= CLONE_INTO_CGROUP;
	args.cgroup = cgroup;
	return syscall(SYS_clone3, &args, sizeof(args));
}

// enter moves this process into the cgroup.
static int enter(int cgroup)
{
	int fd = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = write(fd, "0", 1);
	int saved = errno;
	close(fd);
	errno = saved;
	return n < 0 ? -1 : 0;
}

void bear(void)
{
	long pid = -1;

	for (int i = 0; i < births.count && pid < 0; i++)
		pid = spawn(births.fds[i]);
	if (pid < 0 && births.count) {
		// None takes a new process, or there is a seccomp profile around podmon.
		int entered = -1;
		for (int i = 0; i < births.count && entered < 0; i++)
			entered = enter(births.fds[i]);
		if (entered < 0 && births.must)
			fail("join", "the cgroup");
	}
	if (pid < 0)
		pid = spawn(-1);
	if (pid < 0)
		fail("fork in", "the cgroup");
	if (pid > 0) {
		tell(pid);
		_exit(0);
	}
	if (births.count)
		take_cpus(); // of another cpuset
	while (births.count)
		close(births.fds[--births.count]);
}

bool join_cgroups(void)
{
	static char order[64 << 10];

	// It keeps its number taken, and is closed by the container's program.
	if (fcntl(ORDER, F_SETFD, FD_CLOEXEC) < 0)
		fail("close on exec", "the order of cgroups");
	ssize_t n;
	do // podmon makes the cgroups meanwhile
		n = recv(ORDER, order, sizeof(order) - 1, 0);
	while (n < 0 && errno == EINTR);
	if (n < 1) {
		errno = n < 0 ? errno : ECANCELED;
		fail("receive", "the order of cgroups");
	}
	for (char *entry = order + 1; entry < order + n; entry += strlen(entry) + 1) {
		if (*entry == 'U' || *entry == 'u') {
			births.must = *entry == 'u';
			int fd = open(entry + 1, O_PATH | O_DIRECTORY | O_CLOEXEC);
			if (fd >= 0 && births.count < 2)
				births.fds[births.count++] = fd;
		} else if (put(entry + 1, "0") < 0 && *entry == 't')
			fail("join", entry + 1);
	}
	if (!births.count && births.must)
		fail("open", "the cgroup");
	births.all_cpus = order[0] == 'r';
	take_cpus();
	return births.count;
}

bool has_order(void)
{
	int type = 0;
	socklen_t size = sizeof(type);

	return getsockopt(ORDER, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET;
}

// The priority puts it before libcontainer's constructor, which has none.
void __attribute__((constructor(101))) podmon_join(void)
{
	if (!getenv("_LIBCONTAINER_INITPIPE"))
		return; // not "podmon init"
	// libcontainer's own socket of messages, the one it synchronizes by, never has this
	// number: its console or init socket comes before it, and both are streams.
	if (!has_order())
		return; // libcontainer moves the process
	if (join_cgroups())
		bear();
	else
		tell(-1);
}
