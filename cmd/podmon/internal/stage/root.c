// The root of a container. What is mounted there comes as descriptors of mounts that are
// nowhere yet, by the calls of Linux 5.2 and later: no path leads to it from the outside, and
// the node's mount table is neither changed nor copied, which would take the longer the more
// pods there are: the namespace is a copy of one with nothing in it. Paths in the root are never
// trusted, and are followed as if the root were "/": the image, or who writes to a volume
// meanwhile, may have put links anywhere (CVE-2021-30465, CVE-2025-52881).
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "root.h"
#include "stage.h"

// glibc has these since 2.36; those that are of an enum there have names of our own.
#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#define OPEN_TREE_CLOEXEC O_CLOEXEC
#endif
#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
#define MOVE_MOUNT_T_EMPTY_PATH 0x00000040
#endif
#ifndef FSOPEN_CLOEXEC
#define FSOPEN_CLOEXEC 1
#define FSMOUNT_CLOEXEC 1
#endif
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
enum { SET_FLAG, SET_STRING, CREATE = 6 }; // FSCONFIG_*

#define NEW_ROOT "/root" // in the empty mount namespace

void enter(const char *path, int kind)
{
	if (!*path)
		return;
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0 || setns(fd, kind) < 0)
		fail("join namespace", path);
	close(fd);
}

int tree(int at, const char *path, unsigned flags)
{
	return syscall(SYS_open_tree, at, path, flags | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
}

// put_mount mounts what is nowhere yet, and closes its descriptor.
static void put_mount(int mount, int at, const char *path)
{
	int done = syscall(SYS_move_mount, mount, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	// The file of a mount namespace is mounted below the source, as snapd does, and is older
	// than this one (mnt_ns_loop in fs/namespace.c). A copy of the node's mounts leaves it out.
	if (done < 0 && errno == ELOOP)
		leave_it();
	if (done < 0)
		fail("mount on", path);
	close(mount);
}

void change(int mount, unsigned flags, struct attributes to, uint64_t propagation, const char *path)
{
	struct {
		uint64_t set, clear, propagation, userns;
	} attr = {to.set, to.clear, propagation, 0};
	if (syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | flags, &attr, sizeof(attr)) < 0)
		fail("set attributes of the mount", path);
}

int leave_host(int empty, int root)
{
	if (setns(empty, CLONE_NEWNS) < 0)
		fail("join", "the empty mount namespace");
	if (unshare(CLONE_NEWNS) < 0)
		fail("make", "a mount namespace");
	int at = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (at < 0)
		fail("open", NEW_ROOT);
	put_mount(root, at, NEW_ROOT);
	close(at);
	if (mount(NULL, NEW_ROOT, NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		fail("make private", NEW_ROOT);
	close(empty);
	if ((at = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
		fail("open", NEW_ROOT);
	return at;
}

void show_root(void)
{
	if (chdir(NEW_ROOT) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
		fail("change the root to", NEW_ROOT);
}

// in opens a path in the root. It never leads out of it.
static int in(int root, const char *path, uint64_t flags, uint64_t resolve)
{
	struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve | RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
	return syscall(SYS_openat2, root, path, &how, sizeof(how));
}

// step_in opens a path without any links in it, which the last element may be itself.
static int step_in(int root, const char *path)
{
	return in(root, path, O_PATH | O_NOFOLLOW, RESOLVE_NO_SYMLINKS);
}

// take_name takes the first element of a path, which is ended by it, and leaves the rest.
static char *take_name(char **path)
{
	char *name = *path + strspn(*path, "/"), *end = name + strcspn(name, "/");
	*path = end + strspn(end, "/");
	*end = 0;
	return name;
}

// walk opens what a path leads to and makes what is missing: directories, also where a link
// leads to none, and in the end a file if that is wanted. done is the part that has been
// walked, which has no links.
static int walk(int root, const char *path, bool file)
{
	static char todo[2 * PATH_MAX], rest[PATH_MAX], link[PATH_MAX];
	char done[PATH_MAX] = ".", *at = todo;
	int links = 0, here = step_in(root, done);

	if (snprintf(todo, sizeof(todo), "%s", path) >= PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	while (here >= 0 && *(at += strspn(at, "/"))) {
		const char *name = take_name(&at);
		if (strcmp(name, ".") == 0)
			continue;
		size_t length = strlen(done);
		if (strcmp(name, "..") == 0) {
			char *last = strrchr(done, '/');
			if (last)
				*last = 0;
		} else {
			if (length + 1 + strlen(name) >= sizeof(done)) {
				errno = ENAMETOOLONG;
				return -1;
			}
			sprintf(done + length, "/%s", name);
		}
		int next = step_in(root, done);
		if (next < 0 && errno == ENOENT) {
			int made = file && !*at ? openat(here, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_WRONLY, 0644) : mkdirat(here, name, 0755);
			if (made < 0 && errno != EEXIST)
				return -1;
			if (file && !*at && made >= 0)
				close(made);
			next = step_in(root, done);
		}
		struct stat st;
		if (next < 0 || fstat(next, &st) < 0)
			return -1;
		if (!S_ISLNK(st.st_mode)) {
			close(here);
			here = next;
			continue;
		}
		ssize_t n = readlinkat(next, "", link, sizeof(link) - 1);
		close(next);
		if (n < 0)
			return -1;
		link[n] = 0;
		done[length] = 0;
		if (*link == '/')
			strcpy(done, ".");
		errno = ++links > 40 ? ELOOP : ENAMETOOLONG;
		if (links > 40 || strlen(at) >= sizeof(rest))
			return -1;
		strcpy(rest, at);
		if (snprintf(todo, sizeof(todo), "%s%s%s", link, *rest ? "/" : "", rest) >= (int)sizeof(todo))
			return -1;
		at = todo;
		close(here);
		here = step_in(root, done);
	}
	return here;
}

static dev_t own_proc; // the file system that is the container's /proc, the first of its mounts

// find opens what something is to be mounted on.
static int find(int root, const char *path, bool file)
{
	struct stat st, top;

	int fd = in(root, path, O_PATH, 0);
	// EAGAIN: something was renamed while the kernel went up by "..".
	if (fd < 0 && (errno == ENOENT || errno == EAGAIN))
		fd = walk(root, path, file);
	if (fd < 0 || fstat(fd, &st) < 0 || fstat(root, &top) < 0)
		fail("make mountpoint", path);
	if (st.st_dev == top.st_dev && st.st_ino == top.st_ino)
		refuse("mount on %.3000s: it is the root", path);
	// So programs are not shown another process's, or none, of what they trust /proc for.
	if (st.st_dev == own_proc)
		refuse("mount on %.3000s: it is inside /proc", path);
	return fd;
}

// parent opens the directory that a path is in, and tells the last element.
static int parent(int root, const char *path, const char **name)
{
	char dir[PATH_MAX];
	const char *slash = strrchr(path, '/');

	*name = slash ? slash + 1 : path;
	if (!slash || !**name || snprintf(dir, sizeof(dir), "%.*s/", (int)(slash - path), path) >= (int)sizeof(dir)) {
		errno = EINVAL;
		return -1;
	}
	int fd = in(root, dir, O_PATH | O_DIRECTORY, 0);
	if (fd < 0 && (errno == ENOENT || errno == EAGAIN))
		fd = walk(root, dir, false);
	return fd;
}

static void configure(int fs, unsigned command, const char *key, const char *value, const char *type)
{
	if (syscall(SYS_fsconfig, fs, command, key, value, 0) == 0)
		return;
	if (!key)
		fail("make file system", type);
	refuse("make file system %.100s: option \"%.1000s%s%.1000s\": %s", type, key, value ? "=" : "", value ? value : "", reason());
}

// file_system makes a mount of a new file system.
static int file_system(const char *type, const char *source, char **options, uint64_t attributes)
{
	int fs = syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
	if (fs < 0)
		fail("open file system", type);
	configure(fs, SET_STRING, "source", source, type);
	for (; *options; options++) {
		char *value = strchr(*options, '=');
		if (value)
			*value++ = 0;
		configure(fs, value ? SET_STRING : SET_FLAG, *options, value, type);
	}
	configure(fs, CREATE, NULL, NULL, type);
	int mount = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes);
	if (mount < 0)
		fail("make a mount of", type);
	close(fs);
	return mount;
}

void make_mounts(struct work *all, size_t count)
{
	for (struct work *w = all; w < all + count; w++) {
		if (w->s->kind == MOUNT)
			w->mount = file_system(w->type, w->source, w->options, w->s->top.set);
		if (w->s->kind != BIND)
			continue;
		w->mount = tree(AT_FDCWD, w->source, w->s->recursive ? AT_RECURSIVE : 0);
		if (w->mount < 0)
			fail("bind", w->source);
		change(w->mount, AT_RECURSIVE, (struct attributes){0}, MS_PRIVATE, w->source);
		if (w->s->top.set || w->s->top.clear)
			change(w->mount, 0, w->s->top, 0, w->source);
		if (w->s->all.set || w->s->all.clear)
			change(w->mount, AT_RECURSIVE, w->s->all, 0, w->source);
	}
}

// find_plain opens a directory that is a name in the root, and makes it if there is none.
static int find_plain(int root, const struct work *w)
{
	const char *name = w->path + 1;

	if (mkdirat(root, name, 0755) < 0 && errno != EEXIST)
		fail("make mountpoint", w->path);
	int at = in(root, name, O_PATH | O_NOFOLLOW | O_DIRECTORY, RESOLVE_NO_SYMLINKS);
	if (at < 0 && (errno == ELOOP || errno == ENOTDIR))
		refuse("filesystem \"%s\" must be mounted on ordinary directory", w->type);
	if (at < 0)
		fail("open mountpoint", w->path);
	return at;
}

static void attach(int root, const struct work *w)
{
	struct stat st, its;
	int at;

	if (fstat(w->mount, &st) < 0)
		leave_it(); // FUSE, for others than its user; libcontainer may do without
	// Where these are has to be beyond doubt.
	if (w->s->kind == MOUNT && (strcmp(w->type, "proc") == 0 || strcmp(w->type, "sysfs") == 0))
		at = find_plain(root, w);
	else
		at = find(root, w->path, !S_ISDIR(st.st_mode));
	errno = ENOTDIR; // what mount(2) says; here it would be EINVAL
	if (fstat(at, &its) < 0 || S_ISDIR(st.st_mode) != S_ISDIR(its.st_mode))
		fail("mount on", w->path);
	put_mount(w->mount, at, w->path);
	close(at);
	if (w->s->kind == MOUNT && strcmp(w->type, "proc") == 0)
		own_proc = st.st_dev;
}

static void make_node(int root, const struct work *w)
{
	const char *name;
	struct stat st;
	const struct step *s = w->s;

	int dir = parent(root, w->path, &name);
	if (dir < 0)
		fail("make the directory of", w->path);
	mode_t before = umask(0);
	int made = mknodat(dir, name, s->mode, s->device);
	umask(before);
	if (made < 0 && errno == EPERM)
		leave_it(); // libcontainer binds the node's
	if (made < 0 && errno != EEXIST)
		fail("make device", w->path);
	if (made == 0) {
		int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
		if (fd < 0 || fstat(fd, &st) < 0)
			fail("open device", w->path);
		if ((st.st_mode & S_IFMT) != (s->mode & S_IFMT) || st.st_rdev != s->device)
			refuse("make device %.3000s: it is another one", w->path);
		if (fchownat(fd, "", s->uid, s->gid, AT_EMPTY_PATH) < 0)
			fail("own device", w->path);
		close(fd);
	}
	close(dir);
}

static void make_link(int root, const struct work *w)
{
	const char *name;

	int dir = parent(root, w->path, &name);
	if (dir < 0)
		fail("make the directory of", w->path);
	if (w->s->replace && unlinkat(dir, name, 0) < 0 && errno != ENOENT)
		fail("remove", w->path);
	if (symlinkat(w->source, dir, name) < 0 && errno != EEXIST)
		fail("make link", w->path);
	close(dir);
}

void build(int root, struct work *all, size_t count)
{
	for (struct work *w = all; w < all + count; w++) {
		switch (w->s->kind) {
		case MOUNT:
		case BIND:
			attach(root, w);
			break;
		case NODE:
			make_node(root, w);
			break;
		case LINK:
			make_link(root, w);
			break;
		default:
			refuse("build the root: step %u", w->s->kind);
		}
	}
}

static bool is_null(const struct stat *st)
{
	return S_ISCHR(st->st_mode) && st->st_rdev == makedev(1, 3);
}

// open_null opens the container's /dev/null, which must be that (CVE-2025-31133).
static int open_null(int flags)
{
	struct stat st;

	int fd = open("/dev/null", flags | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		fail("open", "/dev/null");
	if (!is_null(&st))
		refuse("container's /dev/null is invalid");
	return fd;
}

void own_null(void)
{
	struct stat st;
	int null = open_null(O_RDWR);

	for (int fd = 0; fd < 3; fd++)
		if (fstat(fd, &st) < 0 || (is_null(&st) && dup3(null, fd, 0) < 0))
			fail("reopen /dev/null for", "standard input and output");
	close(null);
}

void make_directory(const char *path)
{
	char up[PATH_MAX];
	struct stat st;

	if (stat(path, &st) == 0) {
		errno = ENOTDIR;
		if (!S_ISDIR(st.st_mode))
			fail("mkdir", path);
		return;
	}
	if (snprintf(up, sizeof(up), "%s", path) >= (int)sizeof(up)) {
		errno = ENAMETOOLONG;
		fail("mkdir", path);
	}
	for (char *end = up + 1; *end; end++) {
		if (*end != '/')
			continue;
		*end = 0;
		if (mkdir(up, 0755) < 0 && errno != EEXIST)
			fail("mkdir", up);
		*end = '/';
	}
	if (mkdir(up, 0755) < 0 && errno != EEXIST)
		fail("mkdir", path);
}

void protect(char **paths)
{
	for (; *paths; paths++) {
		int fd = open(*paths, O_PATH | O_CLOEXEC);
		if (fd < 0 && errno == ENOENT)
			continue;
		int same = fd < 0 ? -1 : tree(fd, "", AT_EMPTY_PATH | AT_RECURSIVE);
		if (same < 0)
			fail("make read-only", *paths);
		change(same, 0, (struct attributes){.set = MOUNT_ATTR_RDONLY}, 0, *paths);
		put_mount(same, fd, *paths);
		close(fd);
	}
}

// nothing makes a mount of an empty, read-only directory.
static int nothing(void)
{
	char *options[] = {(char[]){"nr_blocks=1"}, (char[]){"nr_inodes=1"}, "ro", NULL};
	return file_system("tmpfs", "tmpfs", options, MOUNT_ATTR_RDONLY);
}

void mask(char **paths)
{
	int null = -1, empty = -1;

	for (char **path = paths; *path; path++) {
		struct stat st;
		bool again = false;
		for (char **other = paths; other < path; other++)
			again = again || strcmp(*other, *path) == 0;
		if (again)
			continue;
		int at = open(*path, O_PATH | O_CLOEXEC);
		if (at < 0 && errno == ENOENT)
			continue;
		if (at < 0 || fstat(at, &st) < 0)
			fail("mask", *path);
		bool dir = S_ISDIR(st.st_mode);
		if (!dir && null < 0)
			null = open_null(O_PATH);
		// One file system serves all. Only what is mounted somewhere can be cloned.
		int same = dir && empty < 0 ? nothing() : tree(dir ? empty : null, "", AT_EMPTY_PATH);
		if (dir && empty < 0)
			empty = fcntl(same, F_DUPFD_CLOEXEC, 0);
		if (same < 0 || (dir && empty < 0))
			fail("mask", *path);
		put_mount(same, at, *path);
		close(at);
	}
	if (null >= 0)
		close(null);
	if (empty >= 0)
		close(empty);
}
