"""Voting: completions with the same answer count together.

An *extractor*, a function named `package.module:function`, reads the answer from a completion's
text (`bonbon.decoding.answers` has some). It may return any object; answers are equal if their
strings are. A completion for which it returns None or an empty string does not vote. Of answers
with equal scores the one drawn first wins.

Among the completions of the winning answer, or among all if none votes, the one with the highest
reward is returned, of tied ones the first drawn; without rewards the first drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from bonbon.decoding.soft import above_the_best
from bonbon.decoding.strategy import Floats, Generation, Source, WholeDraws, one_hot
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.system.errors import UserCodeError
from bonbon.system.user_functions import error_text, import_function

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward

Answers = Sequence[str | None]


def counts(answers: Answers) -> dict[str, float]:
    """Count the completions of each answer, in the order of first draws."""
    return tally(answers, np.ones(len(answers)))


def tally(answers: Answers, weights: ArrayLike) -> dict[str, float]:
    """Sum the weights, (n,), of each answer's completions, in the order of first draws."""
    scores: dict[str, float] = {}
    for answer, weight in zip(answers, np.asarray(weights, np.float64), strict=True):
        if answer is not None:
            scores[answer] = scores.get(answer, 0.0) + float(weight)
    return scores


def shortest_majority_scores(answers: Answers, lengths: ArrayLike) -> dict[str, float]:
    """Return c/ln l for each answer: its count c over the log of its mean length l in tokens.

    Zeng et al. 2025 (arXiv 2502.12215), section 5. A mean length below 2 counts as 2, since ln l
    is 0 at l = 1 and negative below.
    """
    tokens = tally(answers, lengths)
    return {
        answer: count / math.log(max(tokens[answer] / count, 2.0))
        for answer, count in counts(answers).items()
    }


def reward_weighted_scores(answers: Answers, rewards: ArrayLike, tau: float) -> dict[str, float]:
    """Return each answer's share of e^(r/τ) over the completions that vote; shares sum to 1."""
    voting = [i for i, answer in enumerate(answers) if answer is not None]
    if not voting:
        return {}
    shares = np.exp(above_the_best(np.asarray(rewards, np.float64)[voting], tau))
    return tally([answers[i] for i in voting], shares / shares.sum())


def winner(scores: Mapping[str, float], answers: Answers, rewards: ArrayLike | None) -> int:
    """Return the index of the chosen completion; the module describes ties and missing answers."""
    won = max(scores, key=lambda answer: scores[answer]) if scores else None
    matching = [i for i, answer in enumerate(answers) if answer == won]
    if rewards is None:
        return matching[0]
    return matching[int(np.argmax(np.asarray(rewards)[matching]))]


def extract(function: Callable[[str], Any], name: str, group: Group) -> list[str | None]:
    """Extract each completion's answer. Raises UserCodeError if the extractor raises."""
    answers = []
    for k, completion in enumerate(group.completions, start=1):
        try:
            answer = function(completion)
            answers.append(None if answer is None else str(answer) or None)
        except Exception as error:  # the user's code may raise anything
            raise UserCodeError(
                f"extractor {name!r} failed at prompt {group.prompt_id}, completion {k} "
                f"({completion!r:.60}): {error_text(error)}"
            ) from error
    return answers


class _Vote(WholeDraws):
    """Base of the votes; a subclass scores the answers."""

    loads: ClassVar[frozenset[str]] = frozenset({"extractor"})

    extractor: str = Field(
        "bonbon.decoding.answers:last_number",
        description="package.module:function, from a completion's text to its answer or None",
    )

    def scores(self, answers: Answers, group: Group) -> dict[str, float]:
        """Return the score of each answer, in the order of first draws; the largest wins."""
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """See `Strategy.generate`. Raises BonbonError for an extractor that cannot be imported."""
        import_function(self.extractor, "extractor")  # fail before drawing
        return super().generate(prompts, source, reward)

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        function = import_function(self.extractor, "extractor")
        answers = extract(function, self.extractor, group)
        return one_hot(winner(self.scores(answers, group), answers, group.rewards), group.n)


class SelfConsistency(_Vote):
    """Draw n and return the most frequent answer (Wang et al. 2023, arXiv 2203.11171)."""

    needs_reward: ClassVar[bool] = False

    def scores(self, answers: Answers, group: Group) -> dict[str, float]:
        """See `_Vote.scores`."""
        return counts(answers)


class ShortestMajorityVote(_Vote):
    """Draw n and return the answer with the largest count over the log of its mean length.

    See `shortest_majority_scores`. Meant for reasoning models, whose correct answers tend to be the
    shorter ones.
    """

    needs_reward: ClassVar[bool] = False

    def scores(self, answers: Answers, group: Group) -> dict[str, float]:
        """See `_Vote.scores`."""
        return shortest_majority_scores(answers, group.lengths())


class RewardWeightedVote(_Vote):
    """Draw n and return the answer whose completions have the largest sum of e^(r/τ).

    Rewards may be negative; adding a constant to all changes nothing. τ → 0 is best-of-n among
    the completions that vote; τ → ∞ is self-consistency. (Li et al. 2023, arXiv 2206.02336, sum a
    verifier's probabilities, which is this for τ = 1 and r their logarithm.)
    """

    tau: float = Field(1.0, gt=0, description="temperature, in units of the reward")

    def scores(self, answers: Answers, group: Group) -> dict[str, float]:
        """See `_Vote.scores`."""
        assert group.rewards is not None
        return reward_weighted_scores(answers, group.rewards, self.tau)
