#!/bin/sh
# disk.sh DIR [selinux]: makes the virtual machine's kernel, initrd and system
# disk in DIR from Debian's packages, once; with selinux, with Debian's default
# policy and every file labelled by it. About 400 MB; nothing of it is ever run
# on this machine but what debootstrap and setfiles run in its chroot.
set -eu
dir=$1 lsm=${2:-apparmor}
case $lsm in
apparmor) packages=apparmor ;;
selinux) packages=selinux-policy-default,policycoreutils,selinux-utils ;;
*) echo "disk.sh: no packages are known for LSM=$lsm; there are apparmor and selinux" >&2; exit 2 ;;
esac
[ -e "$dir/system.ext4" ] && exit 0
mkdir -p "$dir"
work=$(mktemp -d "$dir/work-XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

debootstrap --variant=minbase --include=systemd,systemd-sysv,udev,dbus,iptables,nftables,iproute2,busybox,$packages,linux-image-cloud-amd64,initramfs-tools,kmod,procps,ca-certificates,mount \
	bookworm "$work/root" >"$dir/debootstrap.log" 2>&1 || { tail -n 20 "$dir/debootstrap.log" >&2; exit 1; }

root=$work/root
echo podshim-vm >"$root/etc/hostname"
echo '/dev/vda / ext4 defaults,noatime 0 1' >"$root/etc/fstab"
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
# Nothing but the payload is to use the emulated CPUs.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer getty@tty1.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
cat >"$root/etc/systemd/system/payload.service" <<'UNIT'
[Unit]
Description=What the disk of the run says
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'mkdir -p /payload && mount -o ro /dev/vdb /payload && exec /bin/sh /payload/guest.sh'
ExecStopPost=/bin/sh -c 'echo "vm: exit $EXIT_STATUS $EXIT_CODE" >/dev/ttyS0'
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
Delegate=yes
[Install]
WantedBy=multi-user.target
UNIT
ln -sf ../payload.service "$root/etc/systemd/system/multi-user.target.wants/payload.service"
# multi-user.target must not wait for a unit that waits for it.
sed -i 's/^After=multi-user.target/After=basic.target dbus.service/' "$root/etc/systemd/system/payload.service"

cp "$root"/boot/vmlinuz-* "$dir/vmlinuz"
cp "$root"/boot/initrd.img-* "$dir/initrd.img"
rm -rf "$root"/var/cache/apt/archives/*.deb
if [ "$lsm" = selinux ]; then
	printf 'SELINUX=permissive\nSELINUXTYPE=default\n' >"$root/etc/selinux/config"
	cp "${0%/*}/containers.cil" "$root/tmp"
	rm -f "$root/initrd.img.old" "$root/vmlinuz.old" # links to nothing cannot be labelled
	# Labels are attributes of files: they go into the disk's file system with them.
	unshare --mount sh -ec 'mount -t proc proc "$1/proc"
		chroot "$1" semodule -n -s default -i /tmp/containers.cil
		exec chroot "$1" setfiles -F -e /proc /etc/selinux/default/contexts/files/file_contexts /' sh "$root"
fi
truncate -s 4G "$work/system.ext4"
mkfs.ext4 -q -d "$root" "$work/system.ext4"
mv "$work/system.ext4" "$dir/system.ext4"
