#!/bin/sh
# guest.sh: what runs inside the virtual machine, from its second disk. See run.sh.
cd /tmp
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PODSHIM_TEST_PATIENCE=5
export PODSHIM_BIN_DIR=/payload/bin PODSHIM_TOOLS_DIR=/payload/tools
. /payload/settings
echo "vm: $(uname -r), cgroup $(stat -fc %T /sys/fs/cgroup), AppArmor $(cat /sys/module/apparmor/parameters/enabled), SELinux $(cat /sys/fs/selinux/enforce 2>/dev/null || echo off), $(systemctl --version | head -n 1)"
/payload/bin/podshim check --root /tmp/check-root --run /tmp/check-run
if [ "$SUITE" = e2e ]; then # kubelet takes the node's address from where the default route leads
	ip link add uplink type bridge && ip address add 192.0.2.1/24 dev uplink && ip link set uplink up && ip route add default via 192.0.2.254 dev uplink
fi
for driver in $DRIVERS; do
	echo "vm: test/$SUITE with the $driver driver"
	cd "/payload/test/$SUITE" # as go test has it
	PODSHIM_TEST_CGROUP_DRIVER=$driver ./suite -test.timeout 60m $ARGS || exit 1
done
