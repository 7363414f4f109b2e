#!/bin/sh
# need.sh PROBE=PACKAGE...: installs those Debian packages whose PROBE is
# missing. A probe with a slash is a file (a pattern is fine), any other a
# program. Says what is missing, and fails, where there is no apt-get.
set -eu

missing=
for pair in "$@"; do
	probe=${pair%%=*}
	case $probe in
	*/*) ls $probe >/dev/null 2>&1 && continue ;;
	*) PATH=$PATH:/usr/sbin:/sbin command -v "$probe" >/dev/null 2>&1 && continue ;;
	esac
	missing="$missing ${pair#*=}"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "need.sh: missing, and no apt-get to install it with:$missing" >&2
	exit 1
fi
echo "installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install >"$log" 2>&1; then
	# The package lists are missing or too old. A foreign source that does not
	# answer is no reason to give up: the install decides.
	apt-get update -o DPkg::Lock::Timeout=300 >"$log" 2>&1 || true
	if ! install >>"$log" 2>&1; then
		cat "$log" >&2
		exit 1
	fi
fi
