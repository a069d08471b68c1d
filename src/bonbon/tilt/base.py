"""The interface of a tilt, and helpers that the tilts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


Ranks = NDArray[np.intp]


@runtime_checkable
class Tilt(Protocol):
    """A density f on the reward quantile u in [0, 1]; an immutable value."""

    def __hash__(self) -> int: ...

    def win_rate(self) -> float:
        """Return P(the tilted policy beats the base model), where a tie counts ½: E_f[u]."""
        ...

    def kl(self) -> float:
        """Return KL(tilted ‖ base) in nats: E_f[ln f(u)]."""
        ...

    def log_density(self, u: ArrayLike) -> Floats:
        """Return ln f(u), elementwise; −inf where the density is 0."""
        ...

    def cdf(self, u: ArrayLike) -> Floats:
        """Return ∫_0^u f, elementwise."""
        ...

    def quantile(self, p: ArrayLike) -> Floats:
        """Return the inverse of `cdf`, elementwise: a uniform p gives a draw from the tilt."""
        ...

    def rank_log_ratio(self, i: ArrayLike, j: ArrayLike, m: int) -> Floats:
        """E[ln f(U_(i)) − ln f(U_(j))] for the i-th and j-th smallest of m base samples (nats)."""
        ...

    def rank_log_density(self, m: int) -> Floats:
        """E[ln f(U_(i))] for the i-th smallest of m base samples, i = 1..m, shape (m,) (nats)."""
        ...


def in_unit_interval(u: ArrayLike, name: str) -> Floats:
    """Convert to float64. Raises ValueError, with this name, for a value outside [0, 1]."""
    array = np.asarray(u, dtype=np.float64)
    if not np.all((array >= 0) & (array <= 1)):
        raise ValueError(f"{name} must lie in [0, 1]")
    return array


def _ranks(i: ArrayLike, j: ArrayLike, m: int) -> tuple[Ranks, Ranks]:
    low, high = np.asarray(i), np.asarray(j)
    for ranks in (low, high):
        if not np.all((ranks >= 1) & (ranks <= m) & (ranks == np.floor(ranks))):
            raise ValueError(f"ranks must be whole numbers in 1..{m} (1 is the smallest)")
    return low.astype(np.intp), high.astype(np.intp)


class ByRank:
    """The methods of a tilt that follow from its `rank_log_density`."""

    def rank_log_ratio(self: Tilt, i: ArrayLike, j: ArrayLike, m: int) -> Floats:
        low, high = _ranks(i, j, m)
        by_rank = self.rank_log_density(m)
        return np.asarray(by_rank[low - 1] - by_rank[high - 1])


@dataclass(frozen=True)
class Identity(ByRank):
    """The base model itself: f(u) = 1."""

    def win_rate(self) -> float:
        return 0.5

    def kl(self) -> float:
        return 0.0

    def log_density(self, u: ArrayLike) -> Floats:
        return np.zeros_like(in_unit_interval(u, "u"))

    def cdf(self, u: ArrayLike) -> Floats:
        return in_unit_interval(u, "u")

    def quantile(self, p: ArrayLike) -> Floats:
        return in_unit_interval(p, "p")

    def rank_log_density(self, m: int) -> Floats:
        return np.zeros(m)
