"""Exact figures by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def beats(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def enumerated_best_of_n(chooser: Sequence[float], judge: Sequence[float], n: int) -> float:
    """Every opponent against the best of every n-subset of the others, ties shared evenly."""
    wins = []
    for opponent in range(len(chooser)):
        others = [k for k in range(len(chooser)) if k != opponent]
        for subset in itertools.combinations(others, n):
            top = max(chooser[k] for k in subset)
            tied = [k for k in subset if chooser[k] == top]
            wins.append(sum(beats(judge[k], judge[opponent]) for k in tied) / len(tied))
    return sum(wins) / len(wins)
