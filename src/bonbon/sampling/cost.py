"""The cost of an answer in tokens, draws and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from bonbon.groups.group import Group

P = ParamSpec("P")


T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """The cost of answers; costs can be added.

    `generated`: tokens drawn from the policy, those of rejected candidates included. `prefilled`:
    prompt tokens that it read, counted once where several rows use one cache. `reward_calls`:
    completions scored, partial ones included. `seconds`: a prompt's share of the wall-clock time.
    """

    generated: int = 0
    prefilled: int = 0
    reward_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.generated + other.generated,
            self.prefilled + other.prefilled,
            self.reward_calls + other.reward_calls,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Candidates:
    """Completions of one prompt and their cost so far."""

    group: Group
    cost: Cost


def timed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """Call a function; return its result and the seconds it took."""
    began = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - began
