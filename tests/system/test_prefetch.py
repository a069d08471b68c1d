"""Files a few at a time, as if one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonbon.system.prefetch import in_turn


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(pauses=st.lists(st.sampled_from([0.0, 0.0005, 0.002]), max_size=20), ahead=st.integers(1, 5))
def test_it_is_a_map_that_looks_no_further_ahead(pauses: list[float], ahead: int) -> None:
    """Whichever call takes how long."""
    taken = 0

    def items() -> Iterator[tuple[int, float]]:
        nonlocal taken
        for item in enumerate(pauses):
            taken += 1
            yield item

    def call(item: tuple[int, float]) -> int:
        time.sleep(item[1])
        return item[0]

    for given_back, number in enumerate(in_turn(call, items(), ahead)):
        assert number == given_back
        assert taken <= given_back + ahead
    assert taken == len(pauses)


def test_as_many_calls_are_under_way_as_are_ahead() -> None:
    meeting = threading.Barrier(3, timeout=30)  # breaks unless three meet
    assert list(in_turn(lambda item: (meeting.wait(), item)[1], range(9), 3)) == list(range(9))


@pytest.mark.parametrize("ahead", [1, 4])
def test_what_a_call_raises_comes_in_its_turn(ahead: int) -> None:
    called = []

    def call(item: int) -> int:
        called.append(item)
        return 10 // (5 - item)

    found = in_turn(call, range(1000), ahead)
    assert list(islice(found, 5)) == [2, 2, 3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert len(called) <= 5 + ahead
    assert list(found) == []


def test_what_the_items_raise_ends_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("no more")

    made = []
    with pytest.raises(ValueError, match="no more"):
        made.extend(in_turn(lambda item: item, items(), 2))


def test_a_reader_that_stops_early_leaves_no_thread() -> None:
    before = set(threading.enumerate())  # other tests' may end meanwhile
    found = in_turn(lambda item: item, range(100), 4)
    assert next(found) == 0
    own = set(threading.enumerate()) - before
    assert own
    found.close()  # type: ignore[attr-defined]
    assert not any(thread.is_alive() for thread in own)
