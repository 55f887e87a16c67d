"""Budget: bytes that connections share."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from fleecenbd.server.limits import Budget


def waiter(called: list[str], name: str, then: Callable[[], None] = lambda: None):
    def call() -> None:
        called.append(name)
        then()

    return call


def test_the_last_one_in_may_overdraw() -> None:
    budget = Budget(100)
    budget.take(99)
    assert budget.has_room()
    budget.take(1000)
    assert not budget.has_room()
    assert budget.taken == 1099


def test_who_waits_is_called_once_when_there_is_room_in_the_order_of_coming() -> None:
    budget, called = Budget(100), []
    budget.take(150)
    first, second = waiter(called, "first"), waiter(called, "second")
    for callback in (first, second, first):
        budget.call_when_room(callback)
    budget.give(50)
    assert called == []
    budget.give(1)
    assert called == ["first", "second"]
    budget.give(99)
    assert called == ["first", "second"]


def test_who_is_called_takes_before_the_next_is_called() -> None:
    budget, called = Budget(100), []
    budget.take(100)
    budget.call_when_room(waiter(called, "first", lambda: budget.take(100)))
    budget.call_when_room(waiter(called, "second"))
    budget.give(100)
    assert called == ["first"]
    budget.give(100)
    assert called == ["first", "second"]


def test_who_has_gone_is_not_called() -> None:
    budget, called = Budget(100), []
    budget.take(100)
    gone = waiter(called, "gone")
    budget.call_when_room(gone)
    budget.forget(gone)
    budget.forget(gone)
    budget.give(100)
    assert called == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), max_size=60))
def test_nobody_waits_while_there_is_room(steps: list[tuple[int, int]]) -> None:
    budget = Budget(100)
    held: list[int] = []
    waiting: set[int] = set()
    callbacks: dict[int, Callable[[], None]] = {
        who: (lambda who=who: waiting.discard(who)) for who in range(4)
    }
    for who, length in steps:
        if budget.has_room():
            budget.take(length)
            held.append(length)
        elif held and length % 2:
            budget.give(held.pop(0))
        else:
            waiting.add(who)
            budget.call_when_room(callbacks[who])
        assert budget.taken == sum(held)
        assert not waiting or not budget.has_room()
