"""Where figures come from, and whether the machine was quiet."""

import os
import threading

from benchmarks import machine


def test_what_others_do_is_noticed() -> None:
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            os.urandom(1 << 20)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert machine.busy_cores() > machine.BUSY_CORES
    finally:
        ended.set()
        thread.join()


def test_a_warning_comes_from_the_busiest_moment() -> None:
    assert machine.warning([0.0, machine.BUSY_CORES]) == ""
    assert "1.5 cores" in machine.warning([0.0, 1.5, 0.1])


def test_nothing_that_is_kept_names_the_machine() -> None:
    kept = repr(machine.machine())
    assert os.uname().nodename not in kept.split()
    assert "cores" in kept


def test_the_commit_is_told_or_unknown_where_there_is_none() -> None:
    name = machine.commit().split()[0]
    assert name == "unknown" or len(name) == 12


def test_versions_are_the_programs_own_words() -> None:
    found = machine.versions()
    assert found["fio"].startswith("fio-")
    assert "qemu-storage-daemon" in found["qemu-storage-daemon"]
