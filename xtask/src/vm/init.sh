#!/bin/busybox sh
# The first program of the machine: finds its root, runs the command in it, says how that ended, and switches off.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
@LOAD@
off() { echo "$1"; echo o >/proc/sysrq-trigger; while :; do sleep 1; done; }
from_host='trans=virtio,version=9p2000.L,msize=512000'
mount -t 9p -o "$from_host,ro,cache=loose" host /lower || off "no root"
mount -t tmpfs upper /upper && mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work root /new || off "no layer over the root"
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
for folder in dev/shm tmp run; do mount -t tmpfs tmpfs "/new/$folder"; done
# What udev would make.
mkdir -p /new/dev/net && mknod /new/dev/net/tun c 10 200
mkdir -p /new/run/lock /new/run/vm /new/run/netns
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t bpf bpf /new/sys/fs/bpf
mount -t 9p -o "$from_host,cache=none" shared /new/run/vm || off "no folder to answer in"
release=$(uname -r)
mkdir -p "/new/usr/lib/modules/$release"
mount -o bind "/new@MODULES@" "/new/usr/lib/modules/$release"
ip link set lo up
hostname rvs-vm
# The kernel looks for modprobe where this process has its root.
exec switch_root /new /bin/bash /run/vm/command
