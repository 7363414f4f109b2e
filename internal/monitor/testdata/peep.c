// Holds up, by SIGSTOP, each process that comes into its PID namespace, as early as it can,
// and looks by way of /proc whether it has a file at the path: one of the host's.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char path[4200];
	int next = fork();

	if (next == 0)
		_exit(0);
	waitpid(next, NULL, 0);
	printf("looks\n");
	fflush(stdout);
	for (next++;; next++) { // PIDs come one after the other, and some are threads
		for (int ahead = 0; kill(next, SIGSTOP) < 0; ahead = (ahead + 1) % 12)
			if (kill(next + ahead, 0) == 0)
				next += ahead;
		for (int who = 0; who < 3; who++) { // its root, its directory, what it has open
			static const char *const of[] = {"root", "cwd", "fd/5"};
			snprintf(path, sizeof(path), "/proc/%d/%s%s", next, of[who], argv[1]);
			int fd = open(path, O_RDONLY);
			printf("%s\n", fd >= 0 ? "the host's file" : strerror(errno));
			if (fd >= 0)
				close(fd);
		}
		fflush(stdout);
		kill(next, SIGCONT);
	}
}
