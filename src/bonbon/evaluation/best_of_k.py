"""Unbiased estimates of best-of-k's reward and win rate, for every k, from one set of draws.

The best of a random k-subset of m draws is the i-th smallest with probability C(i−1, k−1)/C(m, k),
so the mean over all subsets is exact, without drawing subsets. Tied draws share the probability
evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import quad
from scipy.special import log_ndtr

from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.tilt.best_of_n import BestOfN

# --- one prompt -----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _subsets_below(m: int) -> Floats:
    """Compute C(x, k)/C(m, k), the share of k-subsets of the x smallest, shape (k, x = 0..m)."""
    counts = [[math.comb(x, k) / math.comb(m, k) for x in range(m + 1)] for k in range(1, m + 1)]
    return np.array(counts)


def best_of_k_weights(selected_by: ArrayLike) -> Floats:
    """Compute P(draw i is the best of a random k-subset), shape (k = 1..m, m); rows sum to 1.

    Args:
        selected_by: the rewards that select, shape (m,); ties share evenly.
    """
    rewards = np.asarray(selected_by, np.float64)
    below = (rewards[None, :] < rewards[:, None]).sum(axis=1)
    up_to = (rewards[None, :] <= rewards[:, None]).sum(axis=1)
    shares = _subsets_below(len(rewards))
    return np.asarray((shares[:, up_to] - shares[:, below]) / (up_to - below))


def best_of_k_means(selected_by: ArrayLike, values: ArrayLike) -> Floats:
    """Estimate the mean of a value (reward, length, …) over best-of-k, for k = 1..m, shape (m,).

    Unbiased for every k ≤ m. `values` has shape (m,), in the order of `selected_by`.
    """
    return np.asarray(best_of_k_weights(selected_by) @ np.asarray(values, np.float64))


def best_of_k_win_rates(selected_by: ArrayLike, judged_by: ArrayLike) -> Floats:
    """Estimate the win rate of best-of-k against one more draw, for k = 1..m−1, shape (m − 1,).

    The mean, over every opponent j and every k-subset of the other draws, of the win of the
    subset's best: unbiased. There is no such estimate for k = m, since the opponent has to be a
    further draw.

    Args:
        selected_by: the rewards that select, shape (m,).
        judged_by: the rewards that decide the win, shape (m,); often the same.
    """
    chooser, judge = np.asarray(selected_by, np.float64), np.asarray(judged_by, np.float64)
    m = len(chooser)
    less, equal = chooser[None, :] < chooser[:, None], chooser[None, :] == chooser[:, None]
    # For draw i among the draws other than j: the number below it, and the number up to it.
    below = less.sum(axis=1)[:, None] - less
    up_to = (less | equal).sum(axis=1)[:, None] - (less | equal)
    shares = _subsets_below(m - 1)
    difference = judge[:, None] - judge[None, :]
    wins = (difference > 0) + 0.5 * (difference == 0)
    sizes = np.maximum(up_to - below, 1)  # the diagonal, i = j, does not count
    np.fill_diagonal(wins, 0.0)
    weights = (shares[:, up_to] - shares[:, below]) / sizes
    return np.asarray((weights * wins).sum(axis=(1, 2)) / m)


def best_of_n_win_rate(selected_by: ArrayLike, judged_by: ArrayLike, n: int) -> float:
    """Estimate the win rate of best-of-n alone, as `best_of_k_win_rates`.

    Raises ValueError unless n < m.
    """
    m = len(np.asarray(selected_by))
    if not 1 <= n < m:
        raise ValueError(f"best-of-{n} against a further draw needs more than {n} draws, got {m}")
    return float(best_of_k_win_rates(selected_by, judged_by)[n - 1])


# --- over prompts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestOfK:
    """Best-of-k over prompts: expected reward, win rate, and KL (nats) by the closed form.

    `win_rate_by` has the win rate by each further reward; the first reward still selects. An
    extrapolated point has more draws than were made: its intervals contain the sampling error of
    the fitted line, not the error of extrapolating along it.
    """

    k: int
    kl: float
    reward: Figure
    win_rate: Figure
    win_rate_by: Mapping[str, Figure]
    extrapolated: bool = False


def best_of_k_curve(
    rewards: Sequence[ArrayLike],
    n: int,
    *,
    further: Mapping[str, Sequence[ArrayLike]] | None = None,
    beyond: Sequence[int] = (),
    resamples: int = 2000,
) -> list[BestOfK]:
    """Estimate best-of-k for k = 1..n, and extrapolate it to the k in `beyond`.

    Beyond n the curve is a straight line through its upper half (k ≥ n/2): the reward against
    E[max of k standard normals], win rates against k/(k+1), which is exact for a reward without
    ties.

    Args:
        rewards: for each prompt, rewards of shape (m,) of its base draws, the same m > n for all.
        further: further rewards of the same draws, by name.
        beyond: each above n; needs n ≥ 4, for points to fit the line to.

    Raises ValueError for m ≤ n, or for a k that is not beyond n.
    """
    _check_curve(rewards, n, beyond)
    ks = [*range(1, n + 1), *beyond]
    own = np.array([best_of_k_means(r, r)[:n] for r in rewards])
    wins = {
        name: np.array([best_of_k_win_rates(r, j)[:n] for r, j in zip(rewards, judge, strict=True)])
        for name, judge in {"": rewards, **(further or {})}.items()
    }

    def figures(
        per_prompt: Floats, basis: Callable[[int], float], highest: float = math.inf
    ) -> list[Figure]:
        values = per_prompt @ _extrapolation(n, ks, basis).T
        # An extrapolated win rate can exceed 1.
        return [
            bootstrap([column], lambda mean: np.minimum(mean, highest), resamples)
            for column in values.T
        ]

    reward_figures = figures(own, expected_normal_maximum)
    win_figures = {
        name: figures(values, lambda k: k / (k + 1), 1.0) for name, values in wins.items()
    }
    return [
        BestOfK(
            k=k,
            kl=BestOfN(k).kl(),
            reward=reward_figures[index],
            win_rate=win_figures[""][index],
            win_rate_by={name: f[index] for name, f in win_figures.items() if name},
            extrapolated=k > n,
        )
        for index, k in enumerate(ks)
    ]


def _check_curve(rewards: Sequence[ArrayLike], n: int, beyond: Sequence[int]) -> None:
    sizes = {len(np.asarray(r)) for r in rewards}
    if len(sizes) != 1 or n < 1 or min(sizes) <= n:
        raise ValueError(f"a curve up to best-of-{n} needs the same m > {n} draws of each prompt")
    if any(k <= n for k in beyond) or (beyond and n < 4):
        raise ValueError(f"a curve up to best-of-{n} can be extrapolated only to k > n, for n >= 4")


def _extrapolation(n: int, ks: Sequence[int], basis: Callable[[int], float]) -> Floats:
    """Return the matrix (ks, n) that maps a curve's values at 1..n to its values at ks.

    It is linear, so each prompt's curve can be extrapolated before prompts are averaged.
    """
    rows = np.zeros((len(ks), n))
    rows[:n] = np.eye(n)
    upper = np.arange(max(1, n // 2), n + 1)
    design = np.array([[1.0, basis(int(k))] for k in upper])
    for index, k in enumerate(ks[n:], start=n):
        rows[index, upper - 1] = np.array([1.0, basis(k)]) @ np.linalg.pinv(design)
    return rows


@lru_cache(maxsize=256)
def expected_normal_maximum(k: int) -> float:
    """Compute E[max of k standard normals] = ∫ x k φ(x) Φ(x)^(k−1) dx."""

    def integrand(x: float) -> float:
        return float(x * k * np.exp((k - 1) * log_ndtr(x) - x**2 / 2) / math.sqrt(2 * math.pi))

    return float(quad(integrand, -12, 12, limit=200)[0])
