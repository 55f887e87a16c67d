"""What the log tells of a remote disk whose connections are lost."""

from __future__ import annotations

import logging

import pytest

from fleecenbd.storage.remote import TOLD_AT_ONCE, TOLD_EVERY, Telling


def test_attempts_are_told_less_and_less_until_it_is_connected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    telling = Telling()
    telling("fewer connections than were asked for, before all of this")
    telling.start()
    for outage in range(2):
        caplog.clear()
        for attempt in range(1, 3 * TOLD_EVERY + 1):
            telling(f"outage {outage}, attempt {attempt}")
        told = [*range(1, TOLD_AT_ONCE + 1), *range(TOLD_EVERY, 3 * TOLD_EVERY + 1, TOLD_EVERY)]
        expected = [f"outage {outage}, attempt {attempt}" for attempt in told]
        assert [record.getMessage() for record in caplog.records] == expected
        for _ in range(2):  # the second time nothing was lost
            telling.connected("nbd://store")
        assert caplog.records[-1].getMessage().startswith("nbd://store: connected again, after 0.")
        assert len(caplog.records) == len(expected) + 1
