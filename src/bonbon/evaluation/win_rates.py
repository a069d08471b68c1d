"""Win rates from completions that are all of one prompt; a tie counts half."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bonbon.tilt import best_of_n_rank_weights


def win_rate(rewards: ArrayLike, base_rewards: ArrayLike) -> float:
    """P(reward > base reward) over all pairs of one prompt's completions, a tie counting half."""
    ours, base = np.asarray(rewards, dtype=np.float64), np.asarray(base_rewards, dtype=np.float64)
    difference = ours[:, None] - base[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def best_of_n_win_rate(selected_by: ArrayLike, judged_by: ArrayLike, n: int) -> float:
    """Win rate of best-of-n against one more draw, from m > n base completions of one prompt.

    The unbiased combinatorial estimator: the mean, over every opponent j and every n-subset of the
    other completions, of the win of the subset's best. Ties for the best share the choice evenly.

    Args:
        selected_by: the rewards that best-of-n chooses by, shape (m,).
        judged_by: the rewards that decide the win, shape (m,); often the same.
        n: the number of draws. Raises ValueError unless n < m.
    """
    chooser, judge = np.asarray(selected_by, np.float64), np.asarray(judged_by, np.float64)
    m = len(chooser)
    if not 1 <= n < m:
        raise ValueError(f"best-of-{n} against a further draw needs more than {n} draws, got {m}")
    by_rank = best_of_n_rank_weights(m - 1, n)
    wins = np.empty(m)
    for j in range(m):
        others = np.delete(np.arange(m), j)
        # np.unique's inverse gives the tie group of each completion in ascending order, and equal
        # rewards share the weight of the ranks that they take up.
        _, tie_group = np.unique(chooser[others], return_inverse=True)
        sizes = np.bincount(tie_group)
        ends = np.cumsum(sizes)
        cumulative = np.concatenate([[0.0], np.cumsum(by_rank)])
        weights = ((cumulative[ends] - cumulative[ends - sizes]) / sizes)[tie_group]
        difference = judge[others] - judge[j]
        wins[j] = np.sum(weights * ((difference > 0) + 0.5 * (difference == 0)))
    return float(wins.mean())
