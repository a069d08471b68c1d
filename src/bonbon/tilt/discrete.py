"""Tilts of discrete distributions, where rewards tie."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bonbon.tilt.base import Floats, Tilt
from bonbon.tilt.best_of_n import BestOfN


def _checked_pmf(p: ArrayLike, r: ArrayLike) -> tuple[Floats, Floats]:
    probabilities, rewards = np.asarray(p, dtype=np.float64), np.asarray(r, dtype=np.float64)
    if probabilities.ndim != 1 or probabilities.shape != rewards.shape:
        raise ValueError("p and r must be vectors of one length")
    if np.any(probabilities < 0) or not np.isclose(probabilities.sum(), 1, atol=1e-9):
        raise ValueError("p must be non-negative and sum to 1")
    if not np.all(np.isfinite(rewards)):
        raise ValueError("rewards must be finite")
    return probabilities, rewards


def _levels(p: Floats, r: Floats) -> tuple[NDArray[np.intp], Floats, Floats, Floats]:
    """Return each outcome's reward level, and each level's probability, CDF below and CDF at it."""
    _, level = np.unique(r, return_inverse=True)
    mass: Floats = np.bincount(level, weights=p).astype(np.float64)
    upper: Floats = np.clip(np.cumsum(mass), 0, 1)
    upper[-1] = 1.0
    lower = np.concatenate([[0.0], upper[:-1]])
    return level, mass, lower, upper


def tilted_pmf(p: ArrayLike, r: ArrayLike, tilt: Tilt) -> Floats:
    """Compute the exact tilted distribution over finitely many outcomes.

    A reward level at which the base model's CDF rises from F⁻ to F gets the tilt's mass on (F⁻, F];
    outcomes that tie share it in proportion to `p`.

    Args:
        p: base probabilities, shape (outcomes,).
        r: rewards, shape (outcomes,).
    """
    probabilities, rewards = _checked_pmf(p, r)
    level, mass, lower, upper = _levels(probabilities, rewards)
    tilted = tilt.cdf(upper) - tilt.cdf(lower)
    ratio = np.divide(tilted, mass, out=np.zeros_like(mass), where=mass > 0)
    return np.asarray(probabilities * ratio[level])


def best_of_n_pmf(p: ArrayLike, r: ArrayLike, n: float) -> Floats:
    """Compute the distribution of the best of n draws: π(y) = p(y)/p(level) · (F^n − F⁻^n).

    Outcomes that tie share their level's mass in proportion to `p`.

    Beirami et al. 2024, Lemma 1, extended to ties. For `p` and `r` see `tilted_pmf`.
    """
    return tilted_pmf(p, r, BestOfN(n))


def win_rate_pmf(q: ArrayLike, p: ArrayLike, r: ArrayLike) -> float:
    """Compute P(reward of a draw from q > reward of a draw from p); a tie counts ½."""
    challenger, rewards = _checked_pmf(q, r)
    base, _ = _checked_pmf(p, r)
    level, _, lower, upper = _levels(base, rewards)
    return float(np.sum(challenger * ((lower + upper) / 2)[level]))


def kl_pmf(q: ArrayLike, p: ArrayLike) -> float:
    """Compute KL(q ‖ p) in nats; infinite where q has mass and p has none."""
    challenger, base = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    some = challenger > 0
    if np.any(base[some] <= 0):
        return math.inf
    return float(np.sum(challenger[some] * np.log(challenger[some] / base[some])))


def best_of_n_bounds(n: float) -> tuple[float, float]:
    """Return upper bounds on best-of-n's win rate and KL: (n/(n+1), ln n − (n−1)/n nats).

    They hold for any rewards and are exact for continuous ones; ties and repeated outcomes lower
    win rate and KL (Beirami et al. 2024, Theorem 1).
    """
    tilt = BestOfN(n)
    return tilt.win_rate(), tilt.kl()


def best_of_n_kl_estimate(logprobs: ArrayLike, n: float) -> Floats:
    """Compute Beirami et al.'s estimate of best-of-n's KL, a value for each completion (nats).

    With ε the base probability of the returned completion,
    (1−ε)^n (ln n + (n−1) ln(1−ε) − (n−1)/n) + (1−(1−ε)^n) ln((1−(1−ε)^n)/ε); average it over
    returned completions (arXiv 2401.01879, section 5). It never exceeds ln n − (n−1)/n.

    Args:
        logprobs: ln ε of each returned completion under the base model.
    """
    BestOfN(n)
    log_eps = np.asarray(logprobs, dtype=np.float64)
    if np.any(np.isnan(log_eps)) or np.any(log_eps > 1e-9):
        raise ValueError("log-probabilities must be numbers <= 0")
    eps = np.exp(np.minimum(log_eps, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_other = np.log1p(-eps)  # ln(1 − ε)
        none = np.exp(n * log_other)  # no other draw equals the returned one
        first = np.where(none > 0, none * (math.log(n) + (n - 1) * log_other - (n - 1) / n), 0.0)
        some = -np.expm1(n * log_other)
        second = np.where(eps > 0, some * np.log(np.where(eps > 0, some / eps, 1.0)), 0.0)
    return np.asarray(first + second)
