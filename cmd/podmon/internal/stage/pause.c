// "podmon pause": makes a process the infra container of a pod and executes the embedded
// pause program. It is born in the namespaces that are the pod's own; those that exist are
// joined by path. One thread, which ends here: neither libcontainer nor Go is ever reached.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "root.h"
#include "stage.h"

#ifndef __GLIBC__
#error "a constructor is given argc and argv by glibc only"
#endif

// Descriptors that are given: the empty mount namespace (empty.go), and a mount of the root.
#define EMPTY 4
#define TREE 5

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "pause is written for amd64 and arm64"
#endif

// Arguments, in the order in which Pause (pause.go) gives them.
enum { COMMAND = 1, PROGRAM, PATH, NET, IPC, UTS, HOSTNAME, OOM_SCORE, UID, GID, FILTER, GROUPS };

// drop gives up every capability, for good, and takes the user and groups.
static void drop(char **argv)
{
	gid_t groups[64];
	size_t n = 0;

	for (char **group = argv + GROUPS; *group; group++) {
		if (n == sizeof(groups) / sizeof(*groups)) {
			errno = E2BIG;
			fail("set groups from", *group);
		}
		groups[n++] = strtoul(*group, NULL, 10);
	}
	// The kernel says EINVAL for the first number that is no capability.
	for (int cap = 0; prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0; cap++)
		;
	if (errno != EINVAL)
		fail("drop", "the bounding set");
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		fail("clear", "the ambient capabilities");
	gid_t gid = strtoul(argv[GID], NULL, 10);
	uid_t uid = strtoul(argv[UID], NULL, 10);
	if (setgroups(n, groups) < 0 || setgid(gid) < 0)
		fail("take group", argv[GID]);
	if (setuid(uid) < 0)
		fail("take user", argv[UID]);
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {0};
	if (syscall(SYS_capset, &header, none) < 0)
		fail("drop", "all capabilities");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("set", "no_new_privs");
}

#define ALLOW(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

// filter leaves the system calls of pause.c, the execution of it, and what the kernel makes
// of an interrupted one.
static void filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		ALLOW(rt_sigtimedwait),
		ALLOW(wait4),
		ALLOW(rt_sigprocmask),
		ALLOW(exit_group),
		ALLOW(execve),
		ALLOW(restart_syscall),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
	};
	struct sock_fprog program = {.len = sizeof(code) / sizeof(*code), .filter = code};
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) < 0)
		fail("set", "the seccomp filter");
}

void __attribute__((constructor(102))) podmon_pause(int argc, char **argv)
{
	if (argc < GROUPS || strcmp(argv[COMMAND], "pause") != 0 || !has_order())
		return;
	// Nobody in the pod may look into what is podmon's until the program is another.
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("make", "undumpable");
	// Whatever podmon itself was started with; libcontainer does the same.
	if (syscall(SYS_close_range, TREE + 1, ~0U, 0) < 0)
		fail("close", "what podmon was started with");
	if (put("/proc/self/oom_score_adj", argv[OOM_SCORE]) < 0)
		fail("set oom_score_adj to", argv[OOM_SCORE]);
	// Not podmon's. Kernels without keys have none to share.
	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL, 0, 0, 0) < 0 && errno != ENOSYS)
		fail("make", "a session keyring");
	enter(argv[NET], CLONE_NEWNET);
	enter(argv[IPC], CLONE_NEWIPC);
	enter(argv[UTS], CLONE_NEWUTS);
	if (*argv[HOSTNAME] && sethostname(argv[HOSTNAME], strlen(argv[HOSTNAME])) < 0)
		fail("set hostname", argv[HOSTNAME]);
	join_cgroups(); // while their files can be seen
	close(leave_host(EMPTY, TREE));
	show_root();
	if (mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0)
		fail("make read-only", "the root");
	umask(022);
	drop(argv);
	if (access(argv[PROGRAM], X_OK) < 0)
		fail("execute", argv[PROGRAM]);
	if (send(ORDER, "", 1, MSG_NOSIGNAL) != 1)
		fail("tell of", "the start");
	if (*argv[FILTER])
		filter();
	char *args[] = {argv[PROGRAM], NULL}, *env[] = {argv[PATH], NULL};
	execve(argv[PROGRAM], args, env);
	_exit(127);
}
