"""Ordered concurrent calls: a store has a long latency, but answers many requests at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 8


def in_turn(
    call: Callable[[Item], Made], items: Iterable[Item], ahead: int = AHEAD
) -> Iterator[Made]:
    """Yield `call(item)` of each item in order, as `map` does, from `ahead` threads.

    At most `ahead` items are taken whose results have not been yielded. An exception of `call` is
    raised in place of its result, and no further item is started.
    """
    with ThreadPoolExecutor(ahead) as pool:
        begun: deque[Future[Made]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(call, item))
                if len(begun) == ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
