"""Speculative rejection: best-of-n that drops the rows with the lowest rewards early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.partial import Score
from bonbon.decoding.stepwise import MOST_TOKENS, ScoredRows, Stepwise, best_first, best_whole
from bonbon.decoding.strategy import Generation, StepwiseSource
from bonbon.groups.group import joined
from bonbon.groups.prompts import EncodedPrompt
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward


def survivors(live: int, alpha: float) -> int:
    """Return how many of `live` rows are left when the fraction `alpha` < 1 of them is dropped."""
    # In floating point 0.29 · 100 is a little less than 29.
    return max(live - int(alpha * live + 1e-9), min(live, 1))


def _drop_least(rows: ScoredRows, live: Sequence[int], count: int) -> None:
    rewards = np.array(rows.scored().rewards)[live]
    dropped = {live[index] for index in best_first(rewards)[-count:]}
    rows.select([row for row in range(rows.n) if row not in dropped])


class SpeculativeRejection(Stepwise):
    """Draw n rows; at each checkpoint drop the fraction α of live rows with the lowest rewards.

    Returns the best whole completion (Sun et al. 2024, arXiv 2410.20290). Live rows are those that
    have not finished. Their number times α is rounded down, so at least one stays; of tied rows the
    later ones are dropped. Whole completions are never dropped and hold no cache. A dropped row
    stays in the group, after the whole ones, with the finish reason `rejected`, its tokens, and its
    last partial reward. With α = 0 and no budget this is best-of-n at the same cost: nothing
    partial is scored.

    Without `max_cache_tokens` there is a checkpoint every `checkpoint_tokens` tokens. With it, as
    in the paper, the budget (live rows × columns of prompt and completion) sets both the start and
    the checkpoints. As many of the n rows start as fit until `checkpoint_tokens` tokens are drawn.
    A checkpoint comes when the live rows' next token would exceed the budget. It drops the fraction
    α, or more if the rest would not fit for `checkpoint_tokens` further tokens. Rows that finish
    free room and delay the checkpoint. The budget counts the columns in use, without spare columns
    of the cache and the temporary copy when rows are dropped.

    Raises BonbonError for a prompt of which not even one row fits the budget.
    """

    alpha: float = Field(0.5, ge=0, lt=1, description="fraction of live rows that is dropped")
    checkpoint_tokens: int = Field(
        32,
        ge=1,
        le=MOST_TOKENS,
        description="tokens between checkpoints; with a budget, the smallest number",
    )
    max_cache_tokens: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="largest key-value cache (rows x columns)",
    )

    def answer(
        self, prompt: EncodedPrompt, source: StepwiseSource, score: Score, reward: Reward
    ) -> Generation:
        """See `Stepwise.answer`."""
        columns, longest = len(prompt.token_ids), source.config.max_new_tokens
        rows = ScoredRows(source.start(prompt, self._starting(prompt, source.config)), score)
        drawn = 0
        while live := rows.unfinished:
            stretch = min(self._stretch(len(live), columns + drawn), longest - drawn)
            rows.draw(stretch)
            drawn += stretch
            live = rows.unfinished
            going = self._going(len(live), columns + drawn, longest - drawn)
            if going < len(live):
                _drop_least(rows, live, len(live) - going)
            elif self.max_cache_tokens is not None:
                rows.rows.free_finished()
        group = joined([rows.scored(), *rows.left])
        return Generation(group, best_whole(group), rows.cost())

    def _starting(self, prompt: EncodedPrompt, config: SamplingConfig) -> int:
        if self.max_cache_tokens is None:
            return config.n
        columns = len(prompt.token_ids)
        whole = columns + config.max_new_tokens
        if whole > self.max_cache_tokens:
            raise BonbonError(
                f"max_cache_tokens {self.max_cache_tokens} has no room for one row of prompt "
                f"{prompt.prompt_id}, which takes {whole}; raise it, or lower max_new_tokens"
            )
        return min(config.n, self._fitting(columns, config.max_new_tokens))

    def _fitting(self, columns: int, left: int) -> int:
        """Return how many rows fit the budget until the earliest next checkpoint."""
        assert self.max_cache_tokens is not None
        return self.max_cache_tokens // (columns + min(self.checkpoint_tokens, left))

    def _stretch(self, live: int, columns: int) -> int:
        """Return how many tokens `live` rows may draw before the next checkpoint."""
        if self.max_cache_tokens is None:
            return self.checkpoint_tokens
        return self.max_cache_tokens // live - columns

    def _going(self, live: int, columns: int, left: int) -> int:
        """Return how many of `live` rows are kept; all of them before the next checkpoint."""
        if self.max_cache_tokens is None:
            return survivors(live, self.alpha)
        if live * (columns + 1) <= self.max_cache_tokens:
            return live
        return min(survivors(live, self.alpha), self._fitting(columns, left))
