#!/bin/sh
# nbdkit in front of a running server: backup clients come over TCP, encrypted, held back and logged.
#
#   examples/nbdkit/in-front.sh SOCKET EXPORT KEYS [NBDKIT OPTION...]
#
# SOCKET is the server's, EXPORT one of its fleecing exports; KEYS holds the clients' shared keys:
#
#   fleecenbd serve vm.raw --begin nightly -U /run/vm.sock
#   psktool -u backup -p keys.psk          # for a client on another machine: hand it this file
#   examples/nbdkit/in-front.sh /run/vm.sock vm@nightly keys.psk -p 10810
#   nbdcopy 'nbds://backup@HOST:10810/?tls-psk-file=keys.psk' backup.raw     # on the other machine
#
# What nbdkit hands on: reads, TRIM, base:allocation. What it does not: x-fleecenbd:access, and the
# text of errors (the server's log has it). RATE in the environment is the most that all clients
# read together, in bits a second (800M). Who came, and what was asked for, is logged to
# REQUESTS (standard error). Needs nbdkit, and psktool (gnutls-bin) for keys.
set -eu

[ $# -ge 3 ] || { echo "usage: $0 SOCKET EXPORT KEYS [NBDKIT OPTION...]" >&2; exit 2; }
socket=$1 export=$2 keys=$3
shift 3

case $export in
    *@*) ;;
    *) printf 'in-front: %s is a guest disk; name a fleecing export, DISK@SESSION\n' "$export" >&2
       exit 1 ;;
esac

# The log stands before the rate: it shows requests as they come, not when they are let through.
exec nbdkit --foreground --tls=require --tls-psk="$keys" --filter=log --filter=rate "$@" \
    nbd socket="$socket" export="$export" \
    rate="${RATE:-800M}" logfile="${REQUESTS:-/dev/stderr}"
