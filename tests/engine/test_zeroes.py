"""Zeroes told from data."""

from fleecenbd.engine.zeroes import ZEROES, is_zero


def test_zeroes_are_told_from_data_over_more_than_one_step() -> None:
    length = 2 * len(ZEROES) + 5
    data = bytearray(10 + length)
    assert is_zero(data, 10, length)
    assert is_zero(data, 0, 0)
    for position in (10, 10 + len(ZEROES), 9 + 2 * len(ZEROES), 9 + length):
        data[position] = 1
        assert not is_zero(data, 10, length)
        data[position] = 0
    data[9] = 1
    assert is_zero(data, 10, length)
    assert is_zero(data + b"x", 10, length)
