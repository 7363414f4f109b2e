#include <stdbool.h>

// The socket of an Order; see there for what is said.
#define ORDER 3

// fail says what was attempted, on what, and why it went wrong (errno), and ends the process.
void fail(const char *attempt, const char *what) __attribute__((noreturn));

// reason is errno in the words of Go.
const char *reason(void);

// refuse says why, to podmon alone, and ends the process.
void refuse(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

// leave_it has libcontainer start the container, and ends the process.
void leave_it(void) __attribute__((noreturn));

// put writes to a file that exists; -1 with errno when it cannot.
int put(const char *path, const char *value);

// has_order tells whether there is an order to wait for.
bool has_order(void);

// join_cgroups waits for the order and obeys it, but for the cgroups v2 that a process is to
// be born in: true when there are some, for bear.
bool join_cgroups(void);

// bear goes on as another child of podmon's, who is told of its PID: born in the first
// cgroup of the order that takes it, or where its maker is when there is none (any more).
// The child has no descriptor of them.
void bear(void);
