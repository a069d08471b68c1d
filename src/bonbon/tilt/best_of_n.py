"""Best-of-n: f(u) = n·u^(n−1), and its mirror image worst-of-n."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bonbon.tilt.base import ByRank, Floats, in_unit_interval


@dataclass(frozen=True)
class BestOfN(ByRank):
    """The best of n draws: f(u) = n u^(n−1), for any real n ≥ 1."""

    n: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.n) and self.n >= 1):
            raise ValueError(f"best-of-n needs a finite n >= 1, got n = {self.n}")

    def win_rate(self) -> float:
        """n/(n+1)."""
        return self.n / (self.n + 1)

    def kl(self) -> float:
        """ln n − (n−1)/n nats."""
        return math.log(self.n) - (self.n - 1) / self.n

    def log_density(self, u: ArrayLike) -> Floats:
        u = in_unit_interval(u, "u")
        if self.n == 1:
            return np.zeros_like(u)
        with np.errstate(divide="ignore"):
            return np.asarray(math.log(self.n) + (self.n - 1) * np.log(u))

    def cdf(self, u: ArrayLike) -> Floats:
        """u^n."""
        return np.asarray(in_unit_interval(u, "u") ** self.n)

    def quantile(self, p: ArrayLike) -> Floats:
        return np.asarray(in_unit_interval(p, "p") ** (1 / self.n))

    def rank_log_density(self, m: int) -> Floats:
        """ln n + (n−1)(ψ(i) − ψ(m+1)); ranks m = n and 1 differ by BoNBoN's (n−1)·H_{n−1}."""
        # At whole numbers ψ(i) − ψ(m+1) is a difference of harmonic numbers.
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, m + 1))])
        return np.asarray(math.log(self.n) + (self.n - 1) * (harmonic[:-1] - harmonic[-1]))


@dataclass(frozen=True)
class WorstOfN(ByRank):
    """The worst of n draws: f(u) = n (1−u)^(n−1), the mirror image of best-of-n."""

    n: float

    def __post_init__(self) -> None:
        BestOfN(self.n)

    def win_rate(self) -> float:
        """1/(n+1)."""
        return 1 / (self.n + 1)

    def kl(self) -> float:
        return BestOfN(self.n).kl()

    def log_density(self, u: ArrayLike) -> Floats:
        return BestOfN(self.n).log_density(1 - in_unit_interval(u, "u"))

    def cdf(self, u: ArrayLike) -> Floats:
        return 1 - BestOfN(self.n).cdf(1 - in_unit_interval(u, "u"))

    def quantile(self, p: ArrayLike) -> Floats:
        return 1 - BestOfN(self.n).quantile(1 - in_unit_interval(p, "p"))

    def rank_log_density(self, m: int) -> Floats:
        return BestOfN(self.n).rank_log_density(m)[::-1]
