"""A Linux guest is backed up night after night while it writes; a night is restored and booted.

make guest      or, this file alone:   .venv/bin/python -m pytest -s tests/guest/test_nightly.py
"""

import json
from pathlib import Path

from tests.disks import MIB, first_difference
from tests.guest.conftest import MachineMaker
from tests.guest.filesystem import faults, make_filesystem
from tests.guest.machine import MOUNTED, booted
from tests.serving import FLEECENBD, run, serving

SIZE = 256 * MIB
SCRIPT = Path(__file__).parents[2] / "examples" / "nightly.sh"


def _night(folder: Path, socket: Path, kind: str) -> Path:
    """A night with examples/nightly.sh: its backup of the disk vm."""
    (line,) = run(SCRIPT, socket, folder).splitlines()
    assert line.endswith(f"/vm.{kind}")
    return Path(line)


def _restore(backup: Path, target: Path) -> Path:
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", backup, target)
    return target


def test_a_night_s_increment_is_restored_and_booted(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    backups = tmp_path / "backups"
    backups.mkdir()
    with serving(tmp_path, disk) as server:
        with booted(machine_maker(tmp_path, server.unix), "first") as guest:
            guest.mount()
            for folder in ("/kept", "/removed"):
                guest.start_writer(folder, 40)
            guest.wait_fsynced(40)
            guest.stop_writers()
            _night(backups, server.unix, "raw")
            # The second night: more files, others gone and their blocks discarded, and one writer
            # that goes on right through it.
            guest.start_writer("/kept/second", 20)
            guest.wait_fsynced(20)
            guest.stop_writers()
            guest.run(f"rm -r {MOUNTED}/removed && sync && fstrim {MOUNTED}")
            kept = {
                file: total for file, total in guest.fsynced().items() if file.startswith("/kept/")
            }
            guest.start_writer("/changing", 10)
            second = _night(backups, server.unix, "qcow2")
            guest.wait_fsynced(20)
            guest.stop_writers()
            guest.unmount()
            guest.power_off()
            assert guest.kernel_faults() == []
        third = _night(backups, server.unix, "qcow2")
        control = ("--control", f"{server.unix}.control")
        begun = json.loads(run(FLEECENBD, "session", "list", "--json", *control))["sessions"]
    # Nobody wrote after the guest was off: the third night is the disk, byte for byte.
    assert first_difference(_restore(third, tmp_path / "third.raw"), disk) is None

    (tmp_path / "restored").mkdir()
    restored = _restore(second, tmp_path / "restored" / "vm.raw")
    socket = tmp_path / "restored" / "f.sock"
    with (
        serving(socket.parent, restored),
        booted(machine_maker(tmp_path, socket), "restored") as guest,
    ):
        guest.mount()  # its journal is replayed: the night caught it while it wrote
        assert "recovery complete" in guest.kernel_messages()
        told = {}
        for line in guest.run(f"find {MOUNTED}/kept -type f -exec md5sum {{}} +"):
            total, file = line.split()
            told[file.removeprefix(MOUNTED)] = total
        assert told == kept
        assert guest.try_run(f"test -e {MOUNTED}/removed")[0] != 0
        assert guest.run(f"ls {MOUNTED}/changing")
        guest.start_writer("/after", 10)
        guest.wait_fsynced(10)
        guest.stop_writers()
        kept |= guest.fsynced()
        guest.unmount()
        guest.power_off()
        assert guest.kernel_faults() == []
    assert faults(restored, kept, others=True) == []
    sizes = [path.stat().st_blocks * 512 / MIB for path in (second, third)]
    pauses = ", ".join(f"{session['pause_ms']:.0f}" for session in begun)
    print(
        f"\n{len(kept)} files; increments of {sizes[0]:.1f} and {sizes[1]:.1f} MiB; "
        f"the guest was held for {pauses} ms"
    )
