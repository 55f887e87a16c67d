# Holds a listening socket, and runs a server on it as often as it is told to, as systemd does with
# a socket unit. Run by systemd-socket-activate, which has made the socket (descriptor 3):
#
#   supervisor LOG COMMAND...
#
# A line on standard input starts COMMAND; "ended STATUS" is printed when it has ended.

exec 2>>"$1"
shift
while read -r _; do
    # The protocol wants the server's own pid in LISTEN_PID: see sd_listen_fds(3).
    sh -c 'exec env LISTEN_PID=$$ "$@"' sh "$@" </dev/null
    echo "ended $?"
done
