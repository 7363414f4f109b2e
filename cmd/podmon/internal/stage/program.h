// A request, as program.c takes it apart.
#include <linux/filter.h>
#include <stdint.h>
#include <sys/types.h>

#include "stage.h"

// What a request begins with. Rlimits, instructions, groups and strings follow, in this
// order; see encode in program.go.
struct request {
	uint32_t size; // of all of it
	uint32_t namespaces;
	uint32_t uid, gid;
	int32_t oom_score;
	uint32_t no_new_privs;
	uint32_t filter_flags;
	uint32_t rlimits, instructions, groups, args, env; // how many
	uint64_t bounding, effective, permitted, inheritable, ambient;
};

struct rlimit_of {
	uint64_t resource, soft, hard;
};

// A request, taken apart.
struct order {
	const struct request *r;
	const struct rlimit_of *rlimits;
	const struct sock_filter *code;
	const gid_t *groups;
	const char *cwd, *keyring, *apparmor, *selinux;
	char **args, **env;
};

// receive returns the bytes of a request, which podmon sends in pieces: its size is the first
// number in it. least is what must be there of it at once.
const void *receive(size_t least);

// next returns a string, and moves on to the next one.
const char *next(const char **at);

// vector makes count strings an array that ends with NULL.
char **vector(const char **at, uint32_t count);

// take receives the request of a program and takes it apart.
struct order take(void);

// hide: nobody in the container may look into what is podmon's until the program is another.
void hide(void);

// label has the program run under the profile and the label: the kernel keeps them until
// the execution, in a child too. proc is the host's, not one that the container has mounted.
void label(int proc, const struct order *o);

// adjust takes the OOM score and the labels, where the host's /proc is seen.
void adjust(const struct order *o);

// execute gives up what the program must not have, and executes it.
void execute(const struct order *o) __attribute__((noreturn));
