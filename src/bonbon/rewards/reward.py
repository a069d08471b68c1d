"""Rewards: functions of (prompts, completions) that return one number for each completion.

A reward gets a prompt as the user gave it (a text or a list of messages) and a completion's text.
`score_groups` is the only caller: it refuses NaN, infinities and wrong shapes, naming the prompt
and the completion, so that no reward can change a result unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bonbon.groups.group import Group, Prompt
from bonbon.system.errors import BonbonError
from bonbon.system.user_functions import error_text, import_function

RewardFunction = Callable[[Sequence[Prompt], Sequence[str]], Any]


class Reward(Protocol):
    """Scores completions; larger is better."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Return rewards of shape (len(completions),), float64; `prompts[i]` is completion i's."""
        ...


@dataclass(frozen=True)
class FunctionReward:
    """A Python function `(prompts, completions) -> numbers`, named `package.module:function`.

    Raises BonbonError when it cannot be imported or when a call raises.
    """

    name: str
    function: RewardFunction

    @classmethod
    def from_name(cls, name: str) -> FunctionReward:
        """Import the function, also from a module in the current folder."""
        return cls(name, import_function(name, "reward function"))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        try:
            return np.asarray(self.function(prompts, completions), dtype=np.float64)
        except Exception as error:  # the user's code may raise anything
            raise BonbonError(
                f"reward function {self.name!r} failed: {error_text(error)}"
            ) from error


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · reward, for rewards that are to be balanced against each other."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        total = np.zeros(len(completions))
        for index, (weight, reward) in enumerate(self.parts):
            values = np.asarray(reward(prompts, completions), dtype=np.float64)
            if values.shape != total.shape:  # or numpy would broadcast a single number
                raise BonbonError(
                    f"part {index + 1} of the weighted sum returned shape {values.shape} for "
                    f"{len(completions)} completions; it must return one number each"
                )
            total += weight * values
        return total


def score_groups(reward: Reward, groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """Compute the rewards of each group's completions, all groups in one call of the reward.

    Raises BonbonError for a wrong shape, or for a NaN or an infinity, naming prompt and completion.
    """
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [text for group in groups for text in group.completions]
    rewards = np.asarray(reward(prompts, completions), dtype=np.float64)
    if rewards.shape != (len(completions),):
        raise BonbonError(
            f"the reward returned shape {rewards.shape} for {len(completions)} completions (prompts"
            f" {groups[0].prompt_id} to {groups[-1].prompt_id}); it must return one number each"
        )
    scored, start = [], 0
    for group in groups:
        values = rewards[start : start + group.n]
        start += group.n
        for k in np.flatnonzero(~np.isfinite(values)):
            raise BonbonError(
                f"the reward of prompt {group.prompt_id}, completion {k + 1} of {group.n} "
                f"({group.completions[k]!r:.60}) is {values[k]}; a reward must be finite"
            )
        scored.append(tuple(values.tolist()))
    return scored
