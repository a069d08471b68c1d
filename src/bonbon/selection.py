"""Choosing, from each group, the completions that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bonbon.errors import BonbonError
from bonbon.groups import Group


@dataclass(frozen=True)
class Pair:
    """The best and the worst completion of a group, with their base log-probabilities (nats)."""

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    best: tuple[int, ...]
    worst: tuple[int, ...]
    ref_best: float
    ref_worst: float


@dataclass(frozen=True)
class Selection:
    """The pairs of a data set, the n they were chosen from, and how many groups were left out."""

    pairs: list[Pair]
    n: int
    tied: int


def best_and_worst(group: Group) -> tuple[int, int] | None:
    """Indices of the best and the worst completion; None when all rewards are equal.

    Among completions that share the largest (or smallest) reward the first drawn is taken; draws
    are exchangeable, so this is an unbiased choice. Raises BonbonError for an unscored group or one
    of fewer than two completions.
    """
    if group.rewards is None:
        raise BonbonError(f"group {group.prompt_id} has no rewards; run `bonbon score` first")
    if group.n < 2:
        raise BonbonError(
            f"group {group.prompt_id} has {group.n} completion; best against worst needs n >= 2"
        )
    best, worst = max(group.rewards), min(group.rewards)
    return None if best == worst else (group.rewards.index(best), group.rewards.index(worst))


def select_pairs(groups: Sequence[Group]) -> Selection:
    """Best and worst of every group; groups whose rewards all tie are dropped and counted.

    Raises BonbonError when there are no groups, when they differ in n (the target depends on it),
    or when every group ties.
    """
    if not groups:
        raise BonbonError("there are no groups to train on")
    n = groups[0].n
    for group in groups:
        if group.n != n:
            raise BonbonError(
                f"group {group.prompt_id} has {group.n} completions, others have {n}; train on "
                "groups of one size"
            )
    chosen = [(group, best_and_worst(group)) for group in groups]
    pairs = [_pair(group, *indices) for group, indices in chosen if indices is not None]
    if not pairs:
        raise BonbonError(
            f"in all {len(groups)} groups the best and the worst reward tie: the reward tells no "
            "completion from another, so there is nothing to learn"
        )
    return Selection(pairs, n, tied=len(groups) - len(pairs))


def _pair(group: Group, best: int, worst: int) -> Pair:
    return Pair(
        prompt_id=group.prompt_id,
        prompt_token_ids=group.prompt_token_ids,
        best=group.token_ids[best],
        worst=group.token_ids[worst],
        ref_best=group.logprobs[best],
        ref_worst=group.logprobs[worst],
    )
