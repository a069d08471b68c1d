"""The same done to many files, some at a time: a store answers late, but many at once."""

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
    """`call(item)` of each item, in their order; `map` by as many threads as are `ahead`.

    No more than `ahead` items are taken that were not given back. What `call` raises is raised in
    its turn, and then no further item is begun.
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
