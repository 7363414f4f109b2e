// "podmon container": makes a process the PID 1 of a container and executes its program, as
// libcontainer's init does for specs that ask for nothing else (container.go). It is born in
// the namespaces that are the container's own, and in a PID namespace with nobody else in it:
// nobody in the pod can look into it before its program is executed. One thread, which ends
// here: neither libcontainer nor Go is ever reached.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "program.h"
#include "root.h"

// The descriptor that is given: the empty mount namespace (empty.go).
#define EMPTY 4

// What the container's request begins with. Steps and strings follow; see encodePlan in
// container.go.
struct plan {
	uint32_t size; // of all of it
	uint32_t steps, readonly, masked; // how many
	uint32_t cgroup_namespace, readonly_root, own_dev;
	uint32_t pad;
};

// make_keyring makes the container's session keyring, in which its processes may search.
static void make_keyring(const char *name)
{
	char text[512];
	unsigned permissions;

	long key = syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name, 0, 0, 0);
	if (key < 0 && errno == ENOSYS)
		return; // kernels without keys have none to share
	if (key < 0)
		fail("join", "the session keyring");
	long n = syscall(SYS_keyctl, KEYCTL_DESCRIBE, key, text, sizeof(text) - 1, 0);
	if (n < 0)
		fail("describe", "the session keyring");
	text[n < (long)sizeof(text) ? n : (long)sizeof(text) - 1] = 0;
	if (sscanf(text, "%*[^;];%*d;%*d;%x", &permissions) != 1)
		refuse("describe the session keyring: %.100s", text);
	if (syscall(SYS_keyctl, KEYCTL_SETPERM, key, permissions | 0x80000, 0, 0) < 0) // its user may search
		fail("set permissions of", "the session keyring");
}

// wait_for_limits says that all is set up, and returns when the program may be executed: what
// is podmon's work is under no limit.
static void wait_for_limits(void)
{
	char go;
	ssize_t n;

	if (send(ORDER, "ok", 2, MSG_NOSIGNAL) != 2)
		fail("tell of", "the container");
	do
		n = recv(ORDER, &go, 1, 0);
	while (n < 0 && errno == EINTR);
	if (n != 1) {
		errno = n < 0 ? errno : ECANCELED;
		fail("wait for", "the limits");
	}
}

static void run(void)
{
	hide();
	// Whatever podmon itself was started with; libcontainer does the same.
	if (syscall(SYS_close_range, EMPTY + 1, ~0U, 0) < 0)
		fail("close", "what podmon was started with");
	umask(022);
	const struct plan *p = receive(sizeof(*p));
	const struct step *steps = (const struct step *)(p + 1);
	const char *text = (const char *)(steps + p->steps);
	const char *rootfs = next(&text);
	const char *net = next(&text), *ipc = next(&text), *uts = next(&text);
	struct work *all = calloc(p->steps + 1, sizeof(*all));
	if (!all)
		fail("hold", "the steps");
	for (uint32_t i = 0; i < p->steps; i++) {
		all[i] = (struct work){.s = steps + i, .mount = -1, .path = next(&text)};
		all[i].source = next(&text);
		all[i].type = next(&text);
		all[i].options = vector(&text, steps[i].options);
	}
	char **readonly = vector(&text, p->readonly), **masked = vector(&text, p->masked);
	struct order o = take();

	adjust(&o);
	enter(net, CLONE_NEWNET);
	enter(ipc, CLONE_NEWIPC);
	enter(uts, CLONE_NEWUTS);
	if (*o.keyring)
		make_keyring(o.keyring);
	join_cgroups(); // while their files can be seen
	if (p->cgroup_namespace && unshare(CLONE_NEWCGROUP) < 0)
		fail("make", "a cgroup namespace");

	int root = tree(AT_FDCWD, rootfs, AT_RECURSIVE);
	if (root < 0)
		fail("bind", rootfs);
	make_mounts(all, p->steps);
	root = leave_host(EMPTY, root);
	build(root, all, p->steps);
	close(root);
	show_root();
	// There is no descriptor of the node's any more, where a path might lead to by /proc.
	if (p->own_dev)
		own_null();
	make_directory(o.cwd);
	if (p->readonly_root) {
		int top = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (top < 0)
			fail("open", "/");
		change(top, 0, (struct attributes){.set = MOUNT_ATTR_RDONLY}, 0, "/");
		close(top);
	}
	protect(readonly);
	mask(masked);
	wait_for_limits();
	execute(&o);
}

void __attribute__((constructor(102))) podmon_container(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "container") == 0 && has_order())
		run();
}
