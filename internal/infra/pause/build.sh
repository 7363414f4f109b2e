#!/bin/sh
# Builds the embedded pause programs; run by `go generate`. Needs gcc and, for
# arm64, Debian's gcc-aarch64-linux-gnu (or the other way round on arm64).
set -eu
cd "$(dirname "$0")"
build() { # gcc's prefix, output, more flags
	"$1-gcc" -Os -Wall -Wextra -Werror -ffreestanding -nostdlib -nostartfiles -static -fno-pie -no-pie \
		-fno-stack-protector -fno-asynchronous-unwind-tables -fno-ident $3 \
		-Wl,-z,noexecstack -Wl,-z,norelro -Wl,-z,max-page-size=4096 -Wl,-z,noseparate-code \
		-Wl,--build-id=none -Wl,-n -o "$2" pause.c
	"$1-strip" --strip-all --remove-section=.comment "$2"
	chmod 0644 "$2"
}
build x86_64-linux-gnu pause-amd64 -fcf-protection=none
build aarch64-linux-gnu pause-arm64 ""
