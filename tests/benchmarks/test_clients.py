"""What clients print, read by the benchmarks."""

import json

import pytest

from benchmarks.clients import parse_fio, parse_qemu_bench, run


def _side(requests: int, rate: float, p99_ns: int | None = None) -> dict[str, object]:
    side: dict[str, object] = {"total_ios": requests, "iops": rate, "clat_ns": {}}
    if p99_ns is not None:
        side["clat_ns"] = {"percentile": {"50.000000": 1, "99.000000": p99_ns}}
    return side


def _fio(*jobs: dict[str, object]) -> str:
    return "fio: a warning\n" + json.dumps({"fio version": "fio-3.33", "jobs": jobs})


def test_fios_jobs_add_up_and_the_slowest_percentile_counts() -> None:
    text = _fio(
        {"jobname": "a", "error": 0, "read": _side(10, 100.0, 3000), "write": _side(0, 0.0)},
        {"jobname": "b", "error": 0, "read": _side(5, 50.0), "write": _side(1, 25.5, 9000)},
    )
    result = parse_fio(text)
    assert (result.requests, result.rate) == (16, 175.5)
    assert result.p99_s == pytest.approx(9e-6)


def test_a_job_of_fio_that_failed_is_an_error_and_no_figure() -> None:
    text = _fio({"jobname": "a", "error": 5, "read": _side(10, 9.0), "write": _side(0, 0.0)})
    with pytest.raises(RuntimeError, match="job a ended with error 5"):
        parse_fio(text)


@pytest.mark.parametrize("text", ["", "fio: no engine nbd\n", "{}", '{"jobs": [}'])
def test_what_is_not_fios_json_is_an_error(text: str) -> None:
    with pytest.raises(RuntimeError, match="no JSON with jobs"):
        parse_fio(text)


def test_fio_that_made_no_request_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no request"):
        parse_fio(_fio({"error": 0, "read": _side(0, 0.0), "write": _side(0, 0.0)}))


def test_the_time_of_qemu_img_bench_is_found_and_never_nothing() -> None:
    text = "Sending 9 read requests, ...\nRun completed in {} seconds.\n"
    assert parse_qemu_bench(text.format("1.250")) == 1.25
    assert parse_qemu_bench(text.format("0.000")) == 0.0005
    with pytest.raises(RuntimeError, match="how long"):
        parse_qemu_bench("Sending 9 read requests, ...\n")


def test_a_client_that_fails_is_shown_with_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"exited with 3: no such export"):
        run(["sh", "-c", "echo no such export >&2; exit 3"])
    with pytest.raises(RuntimeError, match="no-such-client is missing"):
        run(["no-such-client"])
