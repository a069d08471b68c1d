"""Win rates: how often one policy's completion has the larger reward; a tie counts half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.figures import Figure, Floats, bootstrap, clustered_mean, standard_error


def win_rate(rewards: ArrayLike, base_rewards: ArrayLike) -> float:
    """Compute P(reward > base reward) over all pairs of one prompt's completions; ties count half.

    The U-statistic Σ_ij h(x_i, y_j)/(KL) with h = 1, ½ or 0; unbiased for independent draws.
    """
    return float(_wins(rewards, base_rewards).mean())


def _wins(rewards: ArrayLike, base_rewards: ArrayLike) -> Floats:
    """Compute h(x_i, y_j), shape (K, L)."""
    ours, base = np.asarray(rewards, dtype=np.float64), np.asarray(base_rewards, dtype=np.float64)
    difference = ours[:, None] - base[None, :]
    return np.asarray((difference > 0) + 0.5 * (difference == 0), dtype=np.float64)


def win_rate_variance(rewards: ArrayLike, base_rewards: ArrayLike) -> float:
    """Estimate the variance of one prompt's `win_rate` over its draws, without bias.

    U² − (S² − A − B + Q)/(K(K−1)L(L−1)), with S the sum of all h_ij, A and B the sums of squared
    row and column sums, and Q the sum of squared h_ij. The second term is the mean of h_ij·h_i'j'
    over i ≠ i', j ≠ j', unbiased for the squared win rate. The estimate can be negative. Raises
    ValueError for fewer than two completions on a side.
    """
    wins = _wins(rewards, base_rewards)
    k, other = wins.shape
    if min(k, other) < 2:
        raise ValueError("the draws' variance needs two completions or more of each policy")
    total, squares = wins.sum(), (wins**2).sum()
    rows, columns = (wins.sum(axis=1) ** 2).sum(), (wins.sum(axis=0) ** 2).sum()
    squared = (total**2 - rows - columns + squares) / (k * (k - 1) * other * (other - 1))
    return float(wins.mean() ** 2 - squared)


@dataclass(frozen=True)
class WinRate:
    """A win rate over prompts.

    `closed_form` is the interval by Student's t, `bootstrap` the one by resampling prompts; both
    treat prompts as clusters and agree except for very few prompts. `standard_error` belongs to the
    first. `draws_share` is the share of the variance that more completions a prompt would remove;
    only more prompts reduce the rest. None with one completion a side.
    """

    closed_form: Figure
    bootstrap: Figure
    standard_error: float
    draws_share: float | None


def win_rate_over_prompts(
    ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike], resamples: int = 2000
) -> WinRate:
    """Estimate one policy's win rate against another, from their rewards on the same prompts.

    Args:
        ours: for each prompt, rewards of shape (K,); K may differ from prompt to prompt.
        theirs: the other policy's rewards, in the same order of prompts.
        resamples: of the bootstrap.

    Raises ValueError for different numbers of prompts, or fewer than two.
    """
    per_prompt = np.array([win_rate(a, b) for a, b in zip(ours, theirs, strict=True)])
    error = standard_error(per_prompt) if len(per_prompt) > 1 else 0.0
    sizes = [min(len(np.asarray(a)), len(np.asarray(b))) for a, b in zip(ours, theirs, strict=True)]
    share = None
    if min(sizes) > 1 and error > 0:
        draws = sum(win_rate_variance(a, b) for a, b in zip(ours, theirs, strict=True))
        share = float(np.clip(draws / len(sizes) ** 2 / error**2, 0, 1))
    return WinRate(
        _bounded(clustered_mean(per_prompt), per_prompt),
        win_rate_figure(per_prompt, resamples),
        error,
        share,
    )


def win_rate_figure(per_prompt: Floats, resamples: int = 2000) -> Figure:
    """Compute the mean of win rates, shape (prompts,), with its bootstrap interval over prompts."""
    return _bounded(bootstrap([per_prompt], lambda mean: mean, resamples), per_prompt)


def _bounded(figure: Figure, per_prompt: Floats) -> Figure:
    """Limit the interval to [0, 1]; keep it wide if every prompt was won, or every one was lost.

    P(win rate 1 on every prompt) ≤ w^prompts for a win rate w, so w ≥ 0.025^(1/prompts) with 97.5%
    confidence.
    """
    least = 0.025 ** (1 / len(per_prompt))
    low = least if np.all(per_prompt == 1) else max(figure.low, 0.0)
    high = 1 - least if np.all(per_prompt == 0) else min(figure.high, 1.0)
    return Figure(figure.value, low, high)


def paired_difference(first: ArrayLike, second: ArrayLike, resamples: int = 2000) -> Figure:
    """Compute the mean of first − second over prompts, with its bootstrap interval.

    For values of two models, shape (prompts,), such as their win rates against the base model. How
    easy a prompt is for both cancels, so the interval is narrower than the two models' own
    intervals suggest.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap([difference], lambda mean: mean, resamples)
