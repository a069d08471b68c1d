"""Selectors: which completions of a group training uses.

A selector maps a scored group to the indices of completions, better ones first, or to None when all
rewards of the group tie. Random selectors depend on the prompt's id alone, so that every run, epoch
and process selects the same completions.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from bonbon.groups.group import Group
from bonbon.system.errors import BonbonError

Selector = Callable[[Group], tuple[int, ...] | None]


@dataclass(frozen=True)
class SelectedGroup:
    """The completions that a selector takes of one group.

    `completions` are token ids. `ref_logps` (summed over tokens, nats, under the base model) and
    `rewards` have one value for each completion.
    """

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    ref_logps: tuple[float, ...]
    rewards: tuple[float, ...]


# --- selectors ------------------------------------------------------------------------------------


def best(group: Group) -> tuple[int, ...] | None:
    """Select the best completion.

    Of completions that share the largest (or smallest) reward the first drawn is taken, here and
    below. Draws are exchangeable, so this has no bias.
    """
    pair = best_and_worst(group)
    return None if pair is None else pair[:1]


def best_and_worst(group: Group) -> tuple[int, ...] | None:
    """Select the best and the worst completion."""
    rewards = checked_rewards(group)
    largest, smallest = max(rewards), min(rewards)
    if largest == smallest:
        return None
    return rewards.index(largest), rewards.index(smallest)


def best_and_random(group: Group) -> tuple[int, ...] | None:
    """Select the best completion and a random one of those with a lower reward."""
    rewards = checked_rewards(group)
    largest = max(rewards)
    lower = [index for index, reward in enumerate(rewards) if reward < largest]
    if not lower:
        return None
    return rewards.index(largest), random.Random(group.prompt_id).choice(lower)


def random_pair(group: Group) -> tuple[int, ...] | None:
    """Select a random pair of completions with different rewards, the better one first."""
    rewards = checked_rewards(group)
    ascending = sorted(rewards)
    below = [bisect_left(ascending, reward) for reward in rewards]  # completions of a lower reward
    if not any(below):
        return None
    draw = random.Random(group.prompt_id)
    (better,) = draw.choices(range(group.n), weights=below)
    lower = [index for index, reward in enumerate(rewards) if reward < rewards[better]]
    return better, draw.choice(lower)


def all_completions(group: Group) -> tuple[int, ...] | None:
    """Select all completions, in the order in which they were drawn."""
    rewards = checked_rewards(group)
    return None if max(rewards) == min(rewards) else tuple(range(len(rewards)))


def checked_rewards(group: Group) -> tuple[float, ...]:
    """Return a group's rewards.

    Raises BonbonError where there are none, where one is not finite, and for fewer than two.
    """
    if group.rewards is None:
        raise BonbonError(f"group {group.prompt_id} has no rewards; run `bonbon score` first")
    if group.n < 2:
        raise BonbonError(
            f"group {group.prompt_id} has {group.n} completion; ranking needs n >= 2, so draw more"
        )
    for k, reward in enumerate(group.rewards):
        if not math.isfinite(reward):  # NaN is neither more nor less than another
            raise BonbonError(
                f"the reward of prompt {group.prompt_id}, completion {k + 1} of {group.n}, is "
                f"{reward}; a reward must be finite"
            )
    return group.rewards
