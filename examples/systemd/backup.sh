#!/bin/sh
# A full backup of one disk of a VM whose server is fleecenbd@VM.service.
#
#   examples/systemd/backup.sh VM DISK TARGET
#
# As root: the server is restarted twice, to begin a session and to end it; the guest waits. The
# status is the backup's. TARGET is written as ../backup-nbdcopy.sh does, which is looked for beside
# this script's folder.
set -eu

fail() { printf 'backup: %s\n' "$*" >&2; exit 1; }

[ $# = 3 ] || { echo "usage: $0 VM DISK TARGET" >&2; exit 2; }
vm=$1 disk=$2 target=$3
run=/run/fleecenbd/$vm
conf=$run/session.conf

[ -S "$run/backup.sock" ] ||
    fail "no socket $run/backup.sock (systemctl start fleecenbd-backup@$vm.socket)"
# Each backup's restarts would end the session of the other. The lock goes with this process.
exec 9<"$run"
flock -n 9 || fail "another backup of $vm is running (wait for it)"

end_session() {
    status=$?
    trap '' HUP INT TERM
    rm -f "$conf"
    systemctl restart "fleecenbd@$vm" || {
        echo "backup: fleecenbd@$vm failed to restart (systemctl status fleecenbd@$vm)" >&2
        [ "$status" != 0 ] || status=1
    }
    exit "$status"
}
trap end_session EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

echo 'SESSION="--begin nightly"' >"$conf"
systemctl restart "fleecenbd@$vm" # Type=notify: returns when the session can be read
# It has been read. A server that crashes from now on comes back with the session as it was, of the
# same moment; with another one (--begin) it never does: no backup is made of two points in time.
rm "$conf"
"$(dirname "$0")/../backup-nbdcopy.sh" "nbd+unix:///$disk@nightly?socket=$run/backup.sock" "$target"
