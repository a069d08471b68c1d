"""Histograms of rewards before and after training, in common bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bonbon.groups.group import Group
from bonbon.report.data import BASE_NAME, Run
from bonbon.tilt.ranks import best_of_n_rank_weights

Floats = NDArray[np.float64]
_MOST_BINS = 40


@dataclass(frozen=True)
class Histograms:
    """`shares` by policy, each of shape (bins,), sum to 1; `edges` has shape (bins + 1,).

    `reference` names the policies to compare with: the base model and best-of-n.
    """

    edges: Floats
    shares: dict[str, Floats]
    reference: tuple[str, ...]


def histograms(run: Run) -> Histograms | None:
    """Return histograms of the reward trained on; None without scored base completions.

    Rewards in the outermost 0.2% at either end are counted in the first or last bin.
    """
    weighted = _weighted_rewards(run)
    if BASE_NAME not in weighted:
        return None
    pooled = np.concatenate([rewards for rewards, _ in weighted.values()])
    # Keeps high - low finite.
    low, high = np.clip(np.percentile(pooled, [0.2, 99.8]), -1e300, 1e300)
    if low == high:
        low, high = low - 0.5, high + 0.5
    fewest = min(len(rewards) for rewards, _ in weighted.values())
    edges = np.linspace(low, high, min(_MOST_BINS, max(10, math.isqrt(fewest))) + 1)
    shares = {
        name: np.histogram(np.clip(rewards, low, high), edges, weights=weights)[0] / weights.sum()
        for name, (rewards, weights) in weighted.items()
    }
    return Histograms(
        edges, shares, tuple(n for n in (BASE_NAME, f"best-of-{run.n}") if n in shares)
    )


def _weighted_rewards(run: Run) -> dict[str, tuple[Floats, Floats]]:
    """Return rewards and their weights: equal, or by rank for policies that keep the best."""
    wanted = {BASE_NAME: None} | {policy.name: policy.best_of for policy in run.lineup}
    weighted, own = {}, f"best-of-{run.n}"
    for name, best_of in wanted.items():
        groups = run.groups.get(name, run.groups.get(BASE_NAME) if name == own else None) or ()
        pairs = [_by_rank(group, best_of or 1) for group in groups if _usable(group, best_of or 1)]
        if pairs:
            rewards, weights = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
            weighted[name] = rewards, weights
    return weighted


def _usable(group: Group, best_of: int) -> bool:
    return (
        group.rewards is not None and group.n >= best_of and bool(np.isfinite(group.rewards).all())
    )


def _by_rank(group: Group, best_of: int) -> tuple[Floats, Floats]:
    # For the best of 1 every rank has the same weight.
    return np.sort(np.array(group.rewards, np.float64)), best_of_n_rank_weights(group.n, best_of)
