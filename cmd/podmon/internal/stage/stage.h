#include <stdbool.h>

// The socket of an Order; see there for what is said.
#define ORDER 3

// fail says what was attempted, on what, and why it went wrong (errno), and ends the process.
void fail(const char *attempt, const char *what) __attribute__((noreturn));

// put writes to a file that exists; -1 with errno when it cannot.
int put(const char *path, const char *value);

// has_order tells whether there is an order to wait for.
bool has_order(void);

// join_cgroups waits for the order and obeys it. True when podmon has been told of a new PID.
bool join_cgroups(void);
