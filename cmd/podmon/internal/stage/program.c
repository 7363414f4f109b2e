// The program of a process in a container: receiving what podmon asks for (program.go), giving
// up what the program must not have, and executing it, as libcontainer's init does at its end.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "program.h"

// The largest request, far above what the kernel takes for arguments and environment.
#define LARGEST (16 << 20)

const void *receive(size_t least)
{
	uint32_t *r = NULL;
	size_t size = least, got = 0;

	for (r = malloc(LARGEST); r && got < size; size = *r) {
		ssize_t n;
		do
			n = recv(ORDER, (char *)r + got, LARGEST - got, 0);
		while (n < 0 && errno == EINTR);
		if (n <= 0) {
			errno = n < 0 ? errno : ECANCELED;
			fail("receive", "the request");
		}
		got += n;
		if (got < least || *r > LARGEST)
			refuse("receive the request: %zu bytes of %u", got, *r);
	}
	if (!r || got != size)
		refuse("receive the request: %zu bytes of %zu", got, size);
	return r;
}

const char *next(const char **at)
{
	const char *it = *at;
	*at += strlen(it) + 1;
	return it;
}

char **vector(const char **at, uint32_t count)
{
	char **list = calloc(count + 1, sizeof(*list));
	if (!list)
		fail("hold", "the arguments");
	for (uint32_t i = 0; i < count; i++)
		list[i] = (char *)next(at);
	return list;
}

static void set_attribute(int proc, const char *name, const char *format, const char *label)
{
	char value[4096];
	int fd = openat(proc, name, O_WRONLY | O_CLOEXEC);
	int n = snprintf(value, sizeof(value), format, label);
	if (n >= (int)sizeof(value))
		refuse("set %s: the label is too long", name);
	if (fd < 0 || write(fd, value, n) != n)
		fail("set", name);
	close(fd);
}

void label(int proc, const struct order *o)
{
	if (*o->selinux) {
		set_attribute(proc, "self/attr/keycreate", "%s", o->selinux);
		set_attribute(proc, "self/attr/exec", "%s", o->selinux);
	}
	if (*o->apparmor) {
		bool own = faccessat(proc, "self/attr/apparmor/exec", F_OK, 0) == 0; // since Linux 5.8
		set_attribute(proc, own ? "self/attr/apparmor/exec" : "self/attr/exec", "exec %s", o->apparmor);
	}
}

void adjust(const struct order *o)
{
	char score[16];
	snprintf(score, sizeof(score), "%d", o->r->oom_score);
	if (put("/proc/self/oom_score_adj", score) < 0)
		fail("set oom_score_adj to", score);
	int proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (proc < 0)
		fail("open", "/proc");
	label(proc, o);
	close(proc);
}

// own_stdio gives the user what is not /dev/null of its standard input and output.
static void own_stdio(uid_t uid)
{
	for (int fd = 0; fd < 3; fd++) {
		struct stat st;
		if (fstat(fd, &st) < 0)
			fail("look at", "standard input and output");
		if (st.st_uid == uid || (S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3)))
			continue;
		if (fchown(fd, uid, -1) < 0 && errno != EPERM && errno != EROFS)
			fail("own", "standard input and output");
	}
}

static void install(const struct request *r, const struct sock_filter *code)
{
	struct sock_fprog program = {.len = r->instructions, .filter = (struct sock_filter *)code};
	if (r->instructions && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, r->filter_flags, &program) < 0)
		fail("set", "the seccomp filter");
}

static void set_capabilities(const struct request *r)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
	for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++)
		data[i] = (struct __user_cap_data_struct){
			.effective = r->effective >> 32 * i,
			.permitted = r->permitted >> 32 * i,
			.inheritable = r->inheritable >> 32 * i,
		};
	if (syscall(SYS_capset, &header, data) < 0)
		fail("set", "capabilities");
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		fail("clear", "ambient capabilities");
	for (int cap = 0; cap < 64; cap++)
		if (r->ambient >> cap & 1) // one that cannot be raised is left out, as by libcontainer
			prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0);
}

// become takes the user, groups, capabilities and working directory.
static void become(const struct request *r, const gid_t *groups, const char *cwd)
{
	// Before the user is another, who may see less. Or more, of what root may not (NFS).
	bool there = chdir(cwd) == 0;
	if (!there && errno != EACCES && errno != EPERM)
		fail("change to the working directory", cwd);
	// The kernel says EINVAL for the first number that is no capability.
	for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (!(r->bounding >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			fail("drop capabilities from", "the bounding set");
	if (errno != EINVAL)
		fail("read", "the bounding set");
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		fail("keep", "capabilities");
	own_stdio(r->uid);
	if (setgroups(r->groups, groups) < 0)
		fail("take", "supplemental groups");
	if (setgid(r->gid) < 0)
		fail("take", "the group");
	if (setuid(r->uid) < 0)
		fail("take", "the user");
	if (!there && chdir(cwd) < 0)
		fail("change to the working directory", cwd);
	// CVE-2024-21626: a directory outside of the root is "(unreachable)" to the kernel.
	char path[4096];
	if (syscall(SYS_getcwd, path, sizeof(path)) < 0)
		fail("look where one is after the change to", cwd);
	if (*path != '/')
		refuse("the working directory %.2000s is outside of the container", cwd);
	if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) < 0)
		fail("no longer keep", "capabilities");
	set_capabilities(r);
}

// executable is 0 or the reason, in errno, why a file is not.
static int executable(const char *path)
{
	struct stat st;
	if (stat(path, &st) < 0)
		return -1;
	if (S_ISDIR(st.st_mode)) {
		errno = EISDIR;
		return -1;
	}
	if (faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) == 0)
		return 0;
	if (errno != ENOSYS && errno != EPERM)
		return -1;
	// A profile does not allow the question; os/exec goes by the mode then, too.
	errno = EACCES;
	return st.st_mode & 0111 ? 0 : -1;
}

// find looks a program up as a shell does, and says what os/exec of Go would: what podmon
// and kubelet know.
static const char *find(const char *name, char **env)
{
	static char file[8192];
	const char *path = "";

	if (strchr(name, '/')) {
		if (executable(name) < 0)
			refuse("exec: \"%.3000s\": %s", name, reason());
		return name;
	}
	for (; *env; env++)
		if (strncmp(*env, "PATH=", 5) == 0)
			path = *env + 5;
	for (bool last = !*path; !last;) {
		const char *end = strchrnul(path, ':');
		int n = snprintf(file, sizeof(file), "%.*s/%s", end == path ? 1 : (int)(end - path), end == path ? "." : path, name);
		if (n < (int)sizeof(file) && executable(file) == 0) {
			if (*file != '/')
				refuse("exec: \"%.3000s\": cannot run executable found relative to current directory", name);
			return file;
		}
		last = !*end;
		path = end + 1;
	}
	refuse("exec: \"%.3000s\": executable file not found in $PATH", name);
}

struct order take(void)
{
	struct order o = {.r = receive(sizeof(*o.r))};
	o.rlimits = (struct rlimit_of *)(o.r + 1);
	o.code = (struct sock_filter *)(o.rlimits + o.r->rlimits);
	o.groups = (gid_t *)(o.code + o.r->instructions);
	const char *text = (char *)(o.groups + o.r->groups);
	o.cwd = next(&text);
	o.keyring = next(&text);
	o.apparmor = next(&text);
	o.selinux = next(&text);
	o.args = vector(&text, o.r->args);
	o.env = vector(&text, o.r->env);
	return o;
}

void hide(void)
{
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("make", "undumpable");
}

void execute(const struct order *o)
{
	const struct request *r = o->r;

	if (r->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("set", "no_new_privs");
	for (uint32_t i = 0; i < r->rlimits; i++) {
		struct rlimit limit = {o->rlimits[i].soft, o->rlimits[i].hard};
		if (setrlimit(o->rlimits[i].resource, &limit) < 0)
			fail("set", "a resource limit");
	}
	if (!r->no_new_privs) // it takes CAP_SYS_ADMIN
		install(r, o->code);
	become(r, o->groups, o->cwd);
	hide(); // another user is what fs.suid_dumpable says
	const char *program = find(o->args[0], o->env);
	// A profile that lets programs run lets them write.
	if (write(ORDER, "", 1) != 1)
		fail("tell of", "the start");
	if (r->no_new_privs) // as late as can be: it may forbid much
		install(r, o->code);
	execve(program, o->args, o->env);
	fail("exec", program);
}
