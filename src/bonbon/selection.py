"""Choosing, from each group, the completions that training uses.

A choice maps a scored group to the indices of its completions, the better ones first, or to None
when the rewards that it would compare all tie. Random choices depend on the prompt's id alone, so
that every run, epoch and process makes the same ones.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bonbon.errors import BonbonError
from bonbon.groups import Group

Select = Callable[[Group], tuple[int, ...] | None]


@dataclass(frozen=True)
class SelectedGroup:
    """The completions of a group that an objective uses.

    `ref_logps` (nats, under the base model) and `rewards` are one a completion.
    """

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    ref_logps: tuple[float, ...]
    rewards: tuple[float, ...]


# --- choices --------------------------------------------------------------------------------------


def best(group: Group) -> tuple[int, ...] | None:
    """The best completion.

    Among completions that share the largest (or smallest) reward the first drawn is taken, here and
    below; draws are exchangeable, so this is an unbiased choice.
    """
    pair = best_and_worst(group)
    return None if pair is None else pair[:1]


def best_and_worst(group: Group) -> tuple[int, ...] | None:
    """The best and the worst completion."""
    rewards = _rewards(group)
    largest, smallest = max(rewards), min(rewards)
    if largest == smallest:
        return None
    return rewards.index(largest), rewards.index(smallest)


def best_and_random(group: Group) -> tuple[int, ...] | None:
    """The best completion and a random one of those with a lower reward."""
    rewards = _rewards(group)
    largest = max(rewards)
    lower = [index for index, reward in enumerate(rewards) if reward < largest]
    if not lower:
        return None
    return rewards.index(largest), random.Random(group.prompt_id).choice(lower)


def random_pair(group: Group) -> tuple[int, ...] | None:
    """A random pair of completions with different rewards, the better one first."""
    rewards = _rewards(group)
    ascending = sorted(rewards)
    below = [bisect_left(ascending, reward) for reward in rewards]  # completions of a lower reward
    if not any(below):
        return None
    draw = random.Random(group.prompt_id)
    (better,) = draw.choices(range(group.n), weights=below)
    lower = [index for index, reward in enumerate(rewards) if reward < rewards[better]]
    return better, draw.choice(lower)


def all_completions(group: Group) -> tuple[int, ...] | None:
    """All completions, as drawn."""
    rewards = _rewards(group)
    return None if max(rewards) == min(rewards) else tuple(range(len(rewards)))


def _rewards(group: Group) -> tuple[float, ...]:
    if group.rewards is None:
        raise BonbonError(f"group {group.prompt_id} has no rewards; run `bonbon score` first")
    if group.n < 2:
        raise BonbonError(f"group {group.prompt_id} has {group.n} completion; ranking needs n >= 2")
    for k, reward in enumerate(group.rewards):
        if not math.isfinite(reward):  # NaN is neither more nor less than another
            raise BonbonError(
                f"the reward of prompt {group.prompt_id}, completion {k + 1} of {group.n}, is "
                f"{reward}; a reward must be finite"
            )
    return group.rewards


# --- a data set -----------------------------------------------------------------------------------


class Chosen(Iterable[SelectedGroup]):
    """What a choice takes of groups, one by one; those that tie are passed over, and counted.

    Iterating raises BonbonError when groups differ in n (the target depends on it), when one is
    unscored, has a reward that is not finite or fewer than two completions, and at the end when
    there were no groups or every one ties.

    Attributes:
        n: the completions of each group that was seen, 0 before.
        tied: how many of them were passed over.
    """

    def __init__(self, groups: Iterable[Group], select: Select) -> None:
        self._groups = groups
        self._select = select
        self.n = 0
        self.tied = 0

    def __iter__(self) -> Iterator[SelectedGroup]:
        self.n = self.tied = kept = 0
        for group in self._groups:
            self.n = self.n or group.n
            if group.n != self.n:
                raise BonbonError(
                    f"group {group.prompt_id} has {group.n} completions, others have {self.n}; "
                    "train on groups of one size"
                )
            indices = self._select(group)
            if indices is None:
                self.tied += 1
            else:
                kept += 1
                yield _selected(group, indices)
        if not kept and not self.tied:
            raise BonbonError("there are no groups to train on")
        if not kept:
            raise BonbonError(
                f"in all {self.tied} groups the best and the worst reward tie: the reward tells no "
                "completion from another, so there is nothing to learn"
            )


def _selected(group: Group, indices: Sequence[int]) -> SelectedGroup:
    rewards = _rewards(group)
    return SelectedGroup(
        prompt_id=group.prompt_id,
        prompt_token_ids=group.prompt_token_ids,
        completions=tuple(group.token_ids[index] for index in indices),
        ref_logps=tuple(group.logprobs[index] for index in indices),
        rewards=tuple(rewards[index] for index in indices),
    )
