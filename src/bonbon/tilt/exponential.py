"""The exponential tilt f(u) ∝ exp(βu): the largest win rate for its KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bonbon.tilt.base import ByRank, Floats, in_unit_interval

# Below this |β| the closed forms of the exponential tilt lose digits to cancellation; their Taylor
# series are exact to float64 there.
_SMALL_BETA = 0.05


@dataclass(frozen=True)
class ExponentialTilt(ByRank):
    """The optimal tilt, f(u) = β e^(βu) / (e^β − 1): the largest win rate at its KL (Theorem 1).

    A negative β prefers low rewards; β = 0 is the base model.
    """

    beta: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise ValueError(f"the exponential tilt needs a finite beta, got {self.beta}")

    def win_rate(self) -> float:
        """1/(1 − e^(−β)) − 1/β."""
        return _exponential_win_rate(self.beta)

    def kl(self) -> float:
        """β·win − ln((e^β − 1)/β) nats."""
        return _exponential_kl(self.beta)

    # A negative β is the mirror image of a positive one, f(u; β) = f(1 − u; −β), and in the
    # positive form e^(−β) underflows harmlessly where e^β would overflow.

    def log_density(self, u: ArrayLike) -> Floats:
        u = in_unit_interval(u, "u")
        if self.beta < 0:
            return ExponentialTilt(-self.beta).log_density(1 - u)
        if self.beta == 0:
            return np.zeros_like(u)
        return np.asarray(self.beta * (u - 1) - math.log(-math.expm1(-self.beta) / self.beta))

    def cdf(self, u: ArrayLike) -> Floats:
        u = in_unit_interval(u, "u")
        if self.beta < 0:
            return 1 - ExponentialTilt(-self.beta).cdf(1 - u)
        if self.beta == 0:
            return u
        share = np.expm1(-self.beta * u) / math.expm1(-self.beta)
        return np.asarray(np.exp(self.beta * (u - 1)) * share)

    def quantile(self, p: ArrayLike) -> Floats:
        p = in_unit_interval(p, "p")
        if self.beta < 0:
            return 1 - ExponentialTilt(-self.beta).quantile(1 - p)
        if self.beta == 0:
            return p
        if self.beta < 1:  # p + (1 − p) e^(−β) is close to 1 here and would lose digits
            u = 1 + np.log1p((1 - p) * math.expm1(-self.beta)) / self.beta
        else:
            with np.errstate(divide="ignore"):  # p = 0 with an underflown e^(−β)
                u = 1 + np.log(p + (1 - p) * math.exp(-self.beta)) / self.beta
        return np.asarray(np.clip(u, 0, 1))

    def rank_log_density(self, m: int) -> Floats:
        """ln f at E[U_(i)] = i/(m + 1), since ln f is linear in u."""
        return self.log_density(np.arange(1, m + 1) / (m + 1))

    @classmethod
    def with_win_rate(cls, win_rate: float) -> ExponentialTilt:
        """Return the tilt with that win rate and the least KL. Raises ValueError outside (0, 1)."""
        if not 0 < win_rate < 1:
            raise ValueError(f"win_rate must lie in (0, 1), got {win_rate}")
        beta = _beta_of_win_rate(max(win_rate, 1 - win_rate))
        return cls(beta if win_rate >= 0.5 else -beta)


def _exponential_win_rate(beta: float) -> float:
    if abs(beta) < _SMALL_BETA:
        return 0.5 + beta / 12 - beta**3 / 720 + beta**5 / 30240
    if beta < 0:
        return 1 - _exponential_win_rate(-beta)
    return -1 / math.expm1(-beta) - 1 / beta


def _exponential_kl(beta: float) -> float:
    beta = abs(beta)  # f(u; −β) = f(1−u; β)
    if beta < _SMALL_BETA:
        return beta**2 / 24 - beta**4 / 960 + beta**6 / 36288
    decayed = math.exp(-beta)
    return beta * decayed / -math.expm1(-beta) - 1 - math.log1p(-decayed) + math.log(beta)


def solve_increasing(f: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Solve f(x) = value for an increasing function, by bisection to float64 precision.

    It is a loop of our own because importing scipy.optimize takes a third of the half second that
    `bonbon frontier` may take.
    """
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if f(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _optimal_win_rate(kl: float) -> float:
    if kl == 0:
        return 0.5
    # KL grows as ln β − 1, so the solution lies below e^(kl + 2).
    beta = solve_increasing(_exponential_kl, kl, 0.0, math.exp(min(kl + 2, 700)))
    return _exponential_win_rate(beta)


def _optimal_kl(win_rate: float) -> float:
    if win_rate == 1:
        return math.inf
    if win_rate == 0.5:
        return 0.0
    edge = max(win_rate, 1 - win_rate)
    return math.inf if edge == 1 else _exponential_kl(_beta_of_win_rate(edge))


def _beta_of_win_rate(win_rate: float) -> float:
    """Return the β ≥ 0 of a win rate in [½, 1)."""
    if win_rate == 0.5:
        return 0.0
    # 1 − win tends to 1/β and never exceeds it, so the solution lies below 1/(1 − win).
    return solve_increasing(_exponential_win_rate, win_rate, 0.0, 1 / (1 - win_rate) + 1)


def optimal_win_rate(kl: ArrayLike) -> Floats:
    """Return the largest win rate of any rank-based policy at `kl` nats, elementwise.

    Raises ValueError for a negative or non-finite KL.
    """
    kls = np.asarray(kl, dtype=np.float64)
    if not np.all(np.isfinite(kls) & (kls >= 0)):
        raise ValueError("kl must be finite and >= 0")
    return np.asarray(np.vectorize(_optimal_win_rate, otypes=[np.float64])(kls))


def optimal_kl(win_rate: ArrayLike) -> Floats:
    """Return the least KL (nats) of any rank-based policy with that win rate, elementwise.

    A win rate below ½ has the KL of its mirror image 1 − win rate; that of 0 and 1 is infinite.
    Raises ValueError outside [0, 1].
    """
    rates = in_unit_interval(win_rate, "win_rate")
    return np.asarray(np.vectorize(_optimal_kl, otypes=[np.float64])(rates))
