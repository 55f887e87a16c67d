"""The example about full temp images tells the truth, and would say so if it did not."""

import os
from pathlib import Path

from tests.examples.conftest import EXAMPLES, example
from tests.serving import try_run

NAME = "temp-image-full.sh"


def test_a_full_temp_image_is_as_the_example_tells() -> None:
    done = example(NAME)
    assert done.status == 0, done.stdout + done.stderr
    steps = [line[0] for line in done.stdout.splitlines() if line[0].isdigit()]
    assert steps == ["1", "2", "3", "4"]
    assert "vm@nightly broke" in done.stderr
    assert "reached its limit" in done.stderr


def test_the_example_about_full_temp_images_fails_where_it_tells_something_untrue(
    tmp_path: Path,
) -> None:
    told = (EXAMPLES / NAME).read_text()
    untrue = 'expect(overwrite(2 << 20) == "ENOSPC")'
    assert told.count('expect(overwrite(2 << 20) == "EIO")') == 1
    copy = tmp_path / "copy.sh"
    copy.write_text(told.replace('expect(overwrite(2 << 20) == "EIO")', untrue))
    result = try_run("sh", copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "not as it should be" in result.stderr
    assert "3. " not in result.stdout


def test_the_example_about_full_temp_images_takes_no_arguments_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    done = example(NAME, "vm.raw")
    assert done.status == 2
    assert done.stderr.startswith("usage: ")
    result = try_run("env", f"TMPDIR={tmp_path}", EXAMPLES / NAME)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == []
