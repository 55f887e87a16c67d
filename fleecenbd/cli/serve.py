"""``fleecenbd serve``: its options as they are typed, into what the server needs to know."""

from __future__ import annotations

import os
from pathlib import Path

import uvloop

from fleecenbd.cli import logs, values
from fleecenbd.cli.disk_options import parse_disk_options
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.handed import Handed, starting_client, take_activated, take_standard_input
from fleecenbd.cli.images import open_disks
from fleecenbd.cli.options import (
    ServeOptions,
    check_control,
    check_default_export,
    check_pidfile_is_no_socket,
    choose_addresses,
    choose_hooks,
    choose_session_options,
    parse_trust_offline,
    refuse_empty,
    refuse_together,
)
from fleecenbd.cli.pidfile import check_pidfile
from fleecenbd.cli.places import default_control, guests_directory, state_directory
from fleecenbd.cli.process import keep_buffers_on_the_heap, start_collecting
from fleecenbd.cli.runner import run_server
from fleecenbd.cli.temp_choice import choose_temp_place
from fleecenbd.cli.words import ServeWords


def serve(words: ServeWords) -> int:
    """Check the options, and run the server to its end; the exit status. Raises CommandError."""
    quiet = words.single or words.run is not None
    level = words.log_level if words.log_level is not None else "warning" if quiet else "info"
    logs.set_up(level, as_json=words.json_log)
    activated, controls = take_activated(os.environ)
    starter = starting_client(activated) if activated is not None else None
    if starter is not None and words.log_level is None:
        logs.set_up("warning", as_json=words.json_log)
    refuse_empty(
        {
            "--unix": words.unix,
            "--ip": words.ip,
            "--backup-unix": words.backup_unix,
            "--state-dir": words.state_dir,
            "--control": words.control,
            "--pidfile": words.pidfile,
            "--trust-offline": words.trust_offline,
        }
    )
    session_given = {
        "--temp-limit": words.temp_limit is not None,
        "--cluster-size": words.cluster_size is not None,
        "--on-cbw-error": words.on_cbw_error is not None,
        "--cbw-timeout": words.cbw_timeout is not None,
        "--ttl": words.ttl is not None,
        "--idle-ttl": words.idle_ttl is not None,
    }
    if words.begin is None:
        refuse_together(session_given, "without --begin")
    else:
        values.check_name(words.begin, "a session")
    sockets_given = {
        "--backup-unix": words.backup_unix is not None,
        "--backup-port": words.backup_port is not None,
        "--unix": words.unix is not None,
        "--ip": words.ip is not None,
        "--port": words.port is not None,
        "--socket-mode": words.socket_mode is not None,
        "--socket-group": words.socket_group is not None,
        "--run": words.run is not None,
    }
    if words.temp_prealloc and words.temp_limit is not None:
        raise UsageError(
            "--temp-limit cannot be given with --temp-prealloc, which takes all space at the start"
        )
    addresses = None
    if activated is not None:
        why = "under socket activation (LISTEN_FDS is set): the sockets are there already"
        refuse_together({**sockets_given, "--single": words.single}, why)
    elif words.single:
        refuse_together(sockets_given, "with --single: the client is there already")
    else:
        addresses = choose_addresses(
            unix=words.unix,
            ip=words.ip,
            port=words.port,
            backup_unix=words.backup_unix,
            backup_port=words.backup_port,
            socket_mode=words.socket_mode,
            socket_group=words.socket_group,
            is_private=words.run is not None,
        )
        check_pidfile_is_no_socket(words.pidfile, addresses)
    control = words.control
    if control is None and addresses is not None:
        control = default_control(addresses.unix)
    check_control(words.control, addresses, words.pidfile)
    if control is None and not controls:
        hooks_given = {
            "--freeze-cmd": words.freeze_cmd is not None,
            "--thaw-cmd": words.thaw_cmd is not None,
            "--hook-timeout": words.hook_timeout is not None,
        }
        refuse_together(hooks_given, "without a control socket (--control)")
    own_client = words.single or starter is not None or words.run is not None
    lasts = not own_client
    disks = values.parse_disks(words.disk)
    disk_options = parse_disk_options(words.cache, words.discard, disks)
    # A guest needs no state: where there is no place for it by default, nothing lasts.
    needs_state = words.begin is not None or words.state_dir is not None
    session_options = choose_session_options(
        temp_limit=words.temp_limit,
        temp_reserve=words.temp_reserve,
        cluster_size=words.cluster_size,
        on_cbw_error=words.on_cbw_error,
        cbw_timeout=words.cbw_timeout,
    )
    options = ServeOptions(
        disks=tuple(map(disk_options.of, disks)),
        addresses=addresses,
        state_directory=state_directory(words.state_dir) if needs_state else guests_directory(None),
        lasts=lasts,
        state_given=words.state_dir is not None,
        end_sessions=words.end_sessions,
        forget_missing=words.forget_missing,
        trust_offline=parse_trust_offline(words.trust_offline, disks),
        guests_directory=None if own_client else guests_directory(words.state_dir),
        session=words.begin,
        session_options=session_options,
        temp_reserve=session_options.temp_reserve,
        temp=choose_temp_place(
            words.temp,
            words.temp_dir,
            preallocated=words.temp_prealloc,
            overwrite=words.temp_overwrite,
        ),
        ttl_s=_period(words.ttl, "--ttl"),
        idle_ttl_s=_period(words.idle_ttl, "--idle-ttl"),
        control=control,
        control_is_default=words.control is None,
        metrics=(
            values.parse_address(words.metrics, "--metrics") if words.metrics is not None else None
        ),
        hooks=choose_hooks(words.freeze_cmd, words.thaw_cmd, words.hook_timeout),
        default_export=words.default_export,
        disk_options=disk_options,
        read_only=words.read_only,
        force_share=words.force_share,
        shared=values.parse_count(words.shared, "--shared"),
        pidfile=Path(words.pidfile) if words.pidfile is not None else None,
        command=words.run,
    )
    check_default_export(options)
    if options.pidfile is not None:
        check_pidfile(options.pidfile, options.disks)
    client = take_standard_input() if words.single else None
    return _run(options, Handed(activated, client, starter, controls))


def _period(text: str | None, option: str) -> float | None:
    return None if text is None else values.parse_period(text, option)


def _run(options: ServeOptions, handed: Handed) -> int:
    keep_buffers_on_the_heap()
    disks = open_disks(options.disks, read_only=options.read_only, force_share=options.force_share)
    start_collecting()
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(run_server(options, disks, handed))
    finally:
        loop.close()  # waits for nothing: a hung device's call ends with the process
