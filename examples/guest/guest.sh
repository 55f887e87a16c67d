#!/bin/sh
# A QEMU guest whose disk is a guest export of fleecenbd's.
#
#   examples/guest/guest.sh SOCKET EXPORT [QEMU OPTION...]
#
# Server and guest may be started in any order, and the server again at any time:
#
#   fleecenbd serve vm.raw -U /run/vm.sock
#   examples/guest/guest.sh /run/vm.sock vm -display gtk -nic user
#
# MACHINE (q35,accel=kvm:tcg: by KVM where that can be, else emulated) and MEMORY (1G) may be set.
# No window is opened unless a -display or -vnc option asks for one. Needs qemu-system-x86, 7.0 or
# later (make tools installs it).
set -eu

[ $# -ge 2 ] || { echo "usage: $0 SOCKET EXPORT [QEMU OPTION...]" >&2; exit 2; }
socket=$1
export=$2
shift 2

# In a list of options a comma is written twice.
quoted() { printf '%s\n' "$1" | sed 's/,/,,/g'; }

# reconnect-delay: when the server goes, QEMU holds the guest's requests so many seconds, repeats
#   them to the next server, and the guest notices no more than a pause. 0, QEMU's own choice, fails
#   them at once, and the guest's file system goes read-only. Longer than the longest restart.
# open-timeout: how long QEMU waits for the server when it starts; 0 gives up at the first refusal.
# discard=unmap, detect-zeroes=unmap: what the guest discards, or fills with zeroes, is freed.
blockdev="driver=nbd,node-name=disk,server.type=unix,server.path=$(quoted "$socket")"
blockdev="$blockdev,export=$(quoted "$export"),reconnect-delay=60,open-timeout=60"
blockdev="$blockdev,discard=unmap,detect-zeroes=unmap"

# werror, rerror: should the server stay away for longer, the guest is stopped and its requests are
#   kept, instead of errors that it would take for a broken disk. Once the server is back, "cont" on
#   QEMU's monitor lets it go on; QEMU itself looks for the server every 16 s at most, so that the
#   first "cont" may come too early.
exec qemu-system-x86_64 \
    -machine "${MACHINE:-q35,accel=kvm:tcg}" -cpu max -m "${MEMORY:-1G}" -nodefaults -vga std -display none \
    -blockdev "$blockdev" \
    -device virtio-blk-pci,drive=disk,bootindex=1,werror=stop,rerror=stop \
    "$@"
