"""Choosing, from each group, the completions that training uses.

A choice maps a scored group to the indices of its completions, the better ones first, or to None
when the rewards that it would compare all tie. Random choices depend on the prompt's id alone, so
that every run, epoch and process makes the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bonbon.errors import BonbonError
from bonbon.groups import Group

Select = Callable[[Group], tuple[int, ...] | None]
Kept = TypeVar("Kept", bound="Sequence[SelectedGroup]")


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens of the prompt, completions, and tokens of the longest completion."""
        lengths = [len(ids) for ids in self.completions]
        return len(self.prompt_token_ids), len(lengths), max(lengths)


@dataclass(frozen=True)
class Selection(Generic[Kept]):
    """What to train on, the n that each group holds, and how many groups were left out."""

    groups: Kept
    n: int
    tied: int

    @property
    def found(self) -> int:
        """How many groups there were to select from."""
        return len(self.groups) + self.tied


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
    everything = range(len(rewards))
    pairs = [(i, j) for i in everything for j in everything if rewards[i] > rewards[j]]
    return random.Random(group.prompt_id).choice(pairs) if pairs else None


def all_completions(group: Group) -> tuple[int, ...] | None:
    """All completions, as drawn."""
    rewards = _rewards(group)
    return None if max(rewards) == min(rewards) else tuple(range(len(rewards)))


def _rewards(group: Group) -> tuple[float, ...]:
    if group.rewards is None:
        raise BonbonError(f"group {group.prompt_id} has no rewards; run `bonbon score` first")
    if group.n < 2:
        raise BonbonError(f"group {group.prompt_id} has {group.n} completion; ranking needs n >= 2")
    return group.rewards


# --- a data set -----------------------------------------------------------------------------------


def select_groups(
    groups: Iterable[Group], select: Select, keep: Callable[[Iterable[SelectedGroup]], Kept]
) -> Selection[Kept]:
    """The chosen completions of every group; groups that tie are dropped and counted.

    The groups are taken one by one; `keep`, `list` for one, holds the selections. Raises
    BonbonError when there are no groups, when they differ in n (the target depends on it), when a
    group is unscored or has fewer than two completions, or when every group ties.
    """
    n = tied = 0

    def chosen() -> Iterator[SelectedGroup]:
        nonlocal n, tied
        for group in groups:
            n = n or group.n
            if group.n != n:
                raise BonbonError(
                    f"group {group.prompt_id} has {group.n} completions, others have {n}; train on "
                    "groups of one size"
                )
            indices = select(group)
            if indices is None:
                tied += 1
            else:
                yield _selected(group, indices)

    kept = keep(chosen())
    if not kept and not tied:
        raise BonbonError("there are no groups to train on")
    if not kept:
        raise BonbonError(
            f"in all {tied} groups the best and the worst reward tie: the reward tells no "
            "completion from another, so there is nothing to learn"
        )
    return Selection(kept, n, tied)


def _selected(group: Group, indices: Sequence[int]) -> SelectedGroup:
    rewards = _rewards(group)
    return SelectedGroup(
        prompt_id=group.prompt_id,
        prompt_token_ids=group.prompt_token_ids,
        completions=tuple(group.token_ids[index] for index in indices),
        ref_logps=tuple(group.logprobs[index] for index in indices),
        rewards=tuple(rewards[index] for index in indices),
    )
