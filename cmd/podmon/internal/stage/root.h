// A container's mount namespace, in which nothing is of the node's but what is mounted for it.
#include <stddef.h>
#include <stdint.h>

// enter joins a namespace by path; an empty one is none.
void enter(const char *path, int kind);

// tree returns a mount like that of the path, and of all below it with AT_RECURSIVE, which is
// nowhere yet.
int tree(int at, const char *path, unsigned flags);

// leave_host goes on in a mount namespace of its own, a copy of the empty one, with root,
// a mount that is nowhere yet, and returns the directory. Both descriptors are closed.
int leave_host(int empty, int root);

// show_root makes that directory all that the process sees.
void show_root(void);

// What is made in a container's root, in the order of the steps.
enum { MOUNT, BIND, NODE, LINK };

// Attributes of a mount: MOUNT_ATTR_*, of which older headers have none.
#ifndef MOUNT_ATTR_RDONLY
#define MOUNT_ATTR_RDONLY 1
#endif
struct attributes {
	uint64_t set, clear;
};

// A step, as Step (container.go) has it.
struct step {
	uint32_t kind;
	uint32_t options;        // of a file system: how many
	uint32_t mode, uid, gid; // of a node
	uint32_t recursive, replace;
	uint32_t pad;
	uint64_t device;
	struct attributes top, all;
};

// A step with its strings.
struct work {
	const struct step *s;
	const char *path;   // in the container
	const char *source; // on the node, of a file system, or of a link
	const char *type;   // of a file system
	char **options;
	int mount; // of a file system or of what is bound, which is nowhere yet
};

// make_mounts makes all mounts, on the node, in the order that /proc/PID/mountinfo is to have.
void make_mounts(struct work *all, size_t count);

// build makes everything in the root.
void build(int root, struct work *all, size_t count);

// The rest is done where the container's root is all that is seen.

// own_null replaces /dev/null of the node by the container's in standard input and output.
void own_null(void);

// make_directory makes one, and those above it.
void make_directory(const char *path);

// protect makes paths read-only; mask hides them. Those that do not exist need neither.
void protect(char **paths);
void mask(char **paths);

// change sets attributes of a mount.
void change(int mount, unsigned flags, struct attributes to, uint64_t propagation, const char *path);
