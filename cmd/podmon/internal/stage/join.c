// Joining cgroups in "podmon init", before libcontainer's C code, which is before Go: one
// thread, still in the host's namespaces.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
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

// libcontainer reads the log pipe and makes its lines the error of the start. Where it has
// no part in that, podmon is told over the socket.
void fail(const char *attempt, const char *path)
{
	char line[8192];
	const char *pipe = getenv("_LIBCONTAINER_LOGPIPE");
	if (!pipe) {
		int n = snprintf(line, sizeof(line), "%s %.6000s: %s", attempt, path, strerror(errno));
		_exit(send(ORDER, line, n, MSG_NOSIGNAL) < 0 ? 2 : 1);
	}
	int n = snprintf(line, sizeof(line), "{\"level\":\"error\",\"msg\":\"%s ", attempt);
	for (; *path && n < 6000; path++)
		line[n++] = (*path == '"' || *path == '\\' || (unsigned char)*path < ' ') ? '?' : *path;
	n += snprintf(line + n, sizeof(line) - n, ": %s\"}\n", strerror(errno));
	_exit(write(atoi(pipe), line, n) < 0 ? 2 : 1);
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

// enter goes on as a child that is born in the cgroup v2 directory. The parent is podmon,
// whom libcontainer's processes must be children of. True when told.
static int enter(const char *dir)
{
	struct clone_args args = {.flags = CLONE_INTO_CGROUP | CLONE_PARENT};
	int fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	args.cgroup = fd;
	long pid = syscall(SYS_clone3, &args, sizeof(args));
	if (pid > 0) {
		tell(pid);
		_exit(0);
	}
	close(fd);
	if (pid == 0)
		return 1;
	// A kernel before 5.7, or a seccomp profile around podmon: the slow way.
	char path[4096];
	snprintf(path, sizeof(path), "%s/cgroup.procs", dir);
	return put(path, "0");
}

bool join_cgroups(void)
{
	static char order[64 << 10];
	bool told = false;

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
		int rc = *entry == 'U' ? enter(entry + 1) : put(entry + 1, "0");
		if (rc < 0 && *entry == 't')
			fail("join", entry + 1);
		told |= rc > 0;
	}
	if (order[0] == 'r') {
		// All CPUs that the cpuset allows: podmon's own affinity is not the container's.
		static unsigned char all[8 << 10];
		memset(all, 0xff, sizeof(all));
		if (syscall(SYS_sched_setaffinity, 0, sizeof(all), all) < 0)
			fail("take", "the CPUs of the cpuset");
	}
	return told;
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
	if (!join_cgroups())
		tell(-1);
}
