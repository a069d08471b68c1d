"""Values of groups that the evaluation averages: rewards, metrics and KL estimates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.figures import Floats
from bonbon.groups.group import Group
from bonbon.tilt.discrete import best_of_n_pmf, kl_pmf

# The names of the KL estimates among a group's metrics.
KL_METRICS = {"rao_blackwellised": "kl", "plain": "kl_plain", "k3": "kl_k3"}
# The KL is exact if the distinct completions have all of the base's probability mass but this.
_MISSING_MASS = 1e-4


def rewards_of(group: Group, name: str = "") -> Floats:
    """Return the rewards that select, or the further reward of that name, shape (n,)."""
    return np.asarray(group.metrics[name] if name else group.rewards, dtype=np.float64)


def metric_of(name: str, group: Group) -> Floats:
    """Return a metric of each completion, shape (n,)."""
    return np.asarray(group.metrics[name], dtype=np.float64)


def best_draw(group: Group, n: int) -> Group:
    """Return the group of only the best of the first n draws (the first of equals)."""
    best = int(np.argmax(rewards_of(group)[:n]))
    return group.part(best, best + 1)


def check_draws(groups: Sequence[Group], wanted: int, whose: str) -> None:
    """Raise ValueError for a group of fewer than `wanted` completions."""
    for group in groups:
        if group.n < wanted:
            raise ValueError(
                f"the {whose} group {group.prompt_id} has {group.n} completions, not {wanted}"
            )


def weighted_means(
    groups: Sequence[Group],
    values: Callable[[Group], ArrayLike],
    weights: Sequence[Floats] | None = None,
) -> Floats:
    """Return each group's weighted mean of values (None: equal weights), shape (prompts,)."""
    if weights is None:
        return np.array([np.asarray(values(group), np.float64).mean() for group in groups])
    return np.array(
        [own @ np.asarray(values(g), np.float64) for g, own in zip(groups, weights, strict=True)]
    )


def kl_estimates(
    groups: Sequence[Group], weights: Sequence[Floats] | None = None
) -> dict[str, Floats]:
    """Return the KL estimates that all groups have; none if the KL is infinite."""
    estimates = {
        name: weighted_means(groups, partial(metric_of, key), weights)
        for name, key in KL_METRICS.items()
        if all(key in group.metrics for group in groups)
    }
    return estimates if all(np.isfinite(values).all() for values in estimates.values()) else {}


def exact_best_of_n_kl(group: Group, n: int) -> float | None:
    """Return best-of-n's exact KL where the group's completions hold all mass, else None, nats."""
    distinct = {
        ids: (logprob, reward)
        for ids, logprob, reward in zip(
            group.token_ids, group.logprobs, rewards_of(group), strict=True
        )
    }
    logprobs, rewards = np.array(list(distinct.values())).T
    p = np.exp(logprobs)
    if abs(p.sum() - 1) > _MISSING_MASS:
        return None
    p /= p.sum()
    return kl_pmf(best_of_n_pmf(p, rewards, n), p)
