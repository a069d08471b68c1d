"""Parts that the stepwise strategies share: scored rows, and the loop over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from bonbon.decoding.catalogue import strategy_name
from bonbon.decoding.partial import Score, by_reward
from bonbon.decoding.strategy import Floats, Generation, Source, StepwiseSource, Strategy
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Cost, timed
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward
    from bonbon.sampling.generation_loop import Rows

MOST_TOKENS = 2**31  # the limit of settings that count tokens
REJECTED = "rejected"  # the finish reason of a completion that was dropped before its end


def best_first(scores: Floats) -> NDArray[np.intp]:
    """Return row numbers by descending score; of tied rows the earlier one first."""
    return np.argsort(-scores, kind="stable")


# --- rows with scores -----------------------------------------------------------------------------


class ScoredRows:
    """Rows of one prompt with their latest scores; a row is scored again only after it has grown.

    Rows that `select` drops are kept in `left`, scored, as groups without a cache: whole ones
    unchanged, others with the finish reason `rejected`.
    """

    def __init__(self, rows: Rows, score: Score) -> None:
        self.rows = rows
        self.left: list[Group] = []
        self.calls = 0  # completions scored
        self._score = score
        self._scores = np.full(rows.n, np.nan)  # NaN: not scored since the row grew
        self._group: Group | None = None  # of all rows as they are now, scored

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.rows.n

    @property
    def unfinished(self) -> list[int]:
        """The rows that have not finished."""
        return [row for row, done in enumerate(self.rows.finished) if not done]

    def draw(self, tokens: int) -> None:
        """Draw up to `tokens` further tokens in every unfinished row."""
        self._scores[self.unfinished] = np.nan
        self._group = None
        self.rows.draw(tokens)

    def scored(self) -> Group:
        """Return the current rows, with their scores as rewards."""
        if self._group is None:
            group, finished = self.rows.group(), self.rows.finished
            grown = np.flatnonzero(np.isnan(self._scores)).tolist()
            if grown:
                whole = [finished[row] for row in grown]
                self._scores[grown] = self._score(group.take(grown), whole)
                self.calls += len(grown)
            self._group = group.with_rewards(self._scores)
        return self._group

    def select(self, rows: Sequence[int]) -> None:
        """Replace row i by the old row `rows[i]`, as `Rows.select` does; score dropped rows."""
        lost = sorted(set(range(self.rows.n)) - set(rows))
        if lost:
            group, finished = self.scored().take(lost), self.rows.finished
            reasons = [
                reason if finished[row] else REJECTED
                for row, reason in zip(lost, group.finish_reasons, strict=True)
            ]
            self.left.append(replace(group, finish_reasons=tuple(reasons)))
        self._scores, self._group = self._scores[list(rows)], None
        self.rows.select(rows)

    def cost(self) -> Cost:
        """Return the cost of the rows so far, without the time."""
        return Cost(self.rows.generated, self.rows.prefilled, self.calls)


def best_whole(group: Group) -> int:
    """Return the whole completion with the largest reward; of tied ones the first."""
    assert group.rewards is not None
    whole = [reason != REJECTED for reason in group.finish_reasons]
    return int(np.argmax(np.where(whole, group.rewards, -np.inf)))


# --- the loop over prompts ------------------------------------------------------------------------


class Stepwise(Strategy):
    """Base of the strategies that score, drop and branch rows while they are drawn.

    Prompts are answered one after the other, each with all its rows at once;
    `sampling.max_batch_tokens` is ignored.
    """

    stepwise: ClassVar[bool] = True
    independent: ClassVar[bool] = False

    def score(self, source: Source, reward: Reward) -> Score:
        """Return the score of completions while they are drawn."""
        return by_reward(reward)

    def answer(
        self, prompt: EncodedPrompt, source: StepwiseSource, score: Score, reward: Reward
    ) -> Generation:
        """Return one prompt's generation, its cost without the time."""
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """See `Strategy.generate`."""
        name = strategy_name(self)
        if not isinstance(source, StepwiseSource):
            raise BonbonError(
                f"strategy {name} drops rows while they are drawn, which needs a model in this "
                "process; load the model here, or choose a strategy of whole draws, such as "
                "best_of_n"
            )
        if reward is None:
            raise ValueError(f"strategy {name} chooses by a reward; pass one")
        score = self.score(source, reward)
        timed_generations = [
            timed(self.answer, prompt, source, score, reward) for prompt in prompts
        ]
        return [
            replace(generation, cost=generation.cost + Cost(seconds=seconds))
            for generation, seconds in timed_generations
        ]
