"""The histogram of guest waits: quantiles that are never too small, and little too large."""

import random

import pytest

from fleecenbd.engine.wait_times import WaitTimes


def test_without_a_wait_every_quantile_is_nothing() -> None:
    assert WaitTimes().quantile(0.99) == 0.0


def test_one_wait_is_every_quantile() -> None:
    times = WaitTimes()
    times.note(0.0123)
    assert times.quantile(0.5) == times.quantile(1.0) == 0.0123


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
def test_a_quantile_is_at_most_a_fifth_too_large(share: float) -> None:
    drawn = random.Random(7)
    waits = [drawn.lognormvariate(-6, 2) for _ in range(5000)]
    times = WaitTimes()
    for wait in waits:
        times.note(wait)
    exact = sorted(waits)[max(0, -(-int(share * 1e6) * len(waits) // 10**6) - 1)]
    assert exact <= times.quantile(share) <= exact * 1.19 + 1e-5
    assert times.count == 5000


def test_waits_beyond_the_last_class_are_told_by_the_longest() -> None:
    times = WaitTimes()
    for wait in (1e-9, 5000.0, 7000.0):
        times.note(wait)
    assert times.quantile(0.3) == pytest.approx(1e-5)
    assert times.quantile(0.99) == 7000.0
