/*
 * The program of the test image e2e-test-images/nonewprivs:1.3. It is
 * installed setuid root: whether the effective user it prints is root or the
 * caller tells if no_new_privs was set.
 */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	return printf("Effective uid: %d\n", geteuid()) < 0;
}
