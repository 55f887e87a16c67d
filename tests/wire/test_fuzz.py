"""What `make fuzz` makes of libFuzzer's words; the fuzzers themselves are its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import fuzz

CLEAN = "INFO: 20 files found\nstat::number_of_executed_units: 8963\nstat::peak_rss_mb: 43\n"
FOUND = (
    "==1== ERROR: libFuzzer: fuzz target exited\n"
    "artifact_prefix='build/fuzz/requests-'; Test unit written to build/fuzz/requests-crash-9e4e\n"
    "stat::number_of_executed_units: 1998\n"
)


def test_a_clean_end_is_told_with_the_number_of_runs() -> None:
    assert fuzz.verdict("handshake", 0, CLEAN) == (True, "handshake: no finding in 8,963 runs")


@pytest.mark.parametrize("status", [0, 71, 77])
def test_a_finding_is_told_with_its_file_and_the_command_that_replays_it(status: int) -> None:
    clean, text = fuzz.verdict("requests", status, FOUND)
    assert not clean
    first, replay = text.splitlines()
    assert first == "requests: a finding after 1,998 runs: build/fuzz/requests-crash-9e4e"
    assert replay == (
        "replay: .venv/bin/python -m tests.wire.fuzz_requests build/fuzz/requests-crash-9e4e"
    )


@pytest.mark.parametrize(("status", "output"), [(1, "No module named 'atheris'"), (0, ""), (9, "")])
def test_a_fuzzer_that_did_not_run_to_its_end_is_no_clean_end(status: int, output: str) -> None:
    clean, text = fuzz.verdict("handshake", status, output)
    assert not clean
    assert f"exit status is {status}" in text


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_has_its_program_its_corpus_and_a_limit_of_memory(name: str) -> None:
    arguments = fuzz.command(name, 5)
    assert Path(__file__).with_name(f"fuzz_{name}.py").exists()
    assert (fuzz.ROOT / f"tests/wire/corpus/{name}").is_dir()
    assert arguments[-1] == f"tests/wire/corpus/{name}"
    assert {"-rss_limit_mb=512", "-max_total_time=5"} <= set(arguments)


def test_all_targets_are_fuzzed_and_told_last_though_the_first_has_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"handshake": (77, FOUND), "requests": (0, CLEAN)}
    monkeypatch.setattr(fuzz, "fuzz", lambda name, seconds: ends[name])
    assert fuzz.main(["--seconds", "5"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "requests: no finding in 8,963 runs"


@pytest.mark.parametrize("seconds", ["0", "-1", "many"])
def test_fuzzing_for_no_time_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["--seconds", seconds])
    assert "--seconds" in capsys.readouterr().err
