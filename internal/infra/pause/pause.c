// pause: the program of the infra container. It sleeps; it exits with 0 on
// SIGTERM and SIGINT; and as PID 1 of a shared PID namespace it reaps the
// orphans that end up with it.
//
// Freestanding: no libc, no data, no relocation, one page of stack. The signals are
// blocked and taken with rt_sigtimedwait, which works for PID 1 too (of the signals
// that PID 1 has no handler for, the kernel keeps those that are blocked), and
// needs no handler and hence no SA_RESTORER.

#if defined(__x86_64__)
enum { SYS_rt_sigprocmask = 14, SYS_exit_group = 231, SYS_wait4 = 61, SYS_rt_sigtimedwait = 128 };

static long call(long n, long a, long b, long c, long d)
{
	long ret;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return ret;
}
#elif defined(__aarch64__)
enum { SYS_rt_sigprocmask = 135, SYS_exit_group = 94, SYS_wait4 = 260, SYS_rt_sigtimedwait = 137 };

static long call(long n, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "pause is written for amd64 and arm64"
#endif

enum { SIG_BLOCK = 0, SIGINT = 2, SIGTERM = 15, SIGCHLD = 17, WNOHANG = 1 };

#define MASK(sig) (1UL << ((sig) - 1))

void _start(void)
{
	unsigned long set = MASK(SIGINT) | MASK(SIGTERM) | MASK(SIGCHLD);

	call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof(set));
	for (;;) {
		// Children that ended before the mask was set are reaped as well.
		while (call(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
			;
		long sig = call(SYS_rt_sigtimedwait, (long)&set, 0, 0, sizeof(set));
		if (sig == SIGTERM || sig == SIGINT)
			call(SYS_exit_group, 0, 0, 0, 0);
	}
}
