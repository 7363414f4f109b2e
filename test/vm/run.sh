#!/bin/sh
# run.sh VM PAYLOAD: boots the virtual machine that disk.sh has made in VM with
# the directory PAYLOAD as its second disk, runs PAYLOAD/guest.sh there as a
# systemd service, and ends with its exit code. The console goes to standard
# output. The emulator is qemu's in software: it runs anywhere, some ten times
# slower than the machine.
set -eu
vm=$1 payload=$2
disk=$(mktemp "$vm/payload-XXXXXX.ext4")
log=$(mktemp "$vm/console-XXXXXX.log")
trap 'rm -f "$disk" "$log"' EXIT
size=$(du -sm "$payload" | cut -f1)
truncate -s "$((size * 5 / 4 + 64))M" "$disk"
mkfs.ext4 -q -d "$payload" "$disk"

qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp "${VM_CPUS:-2}" -m "${VM_MEMORY:-4096}" \
	-nographic -nodefaults -no-reboot -serial stdio -snapshot \
	-drive "file=$vm/system.ext4,format=raw,if=virtio" -drive "file=$disk,format=raw,if=virtio" \
	-kernel "$vm/vmlinuz" -initrd "$vm/initrd.img" \
	-append "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=false systemd.mask=serial-getty@ttyS0.service panic=-1 ${VM_APPEND:-}" </dev/null | tee "$log"
grep -q '^vm: exit 0 exited' "$log"
