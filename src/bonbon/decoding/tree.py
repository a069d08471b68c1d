"""TreeBoN: a tree of partial completions, pruned and branched layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from bonbon.config.training import LARGEST_N
from bonbon.decoding.partial import (
    Partial,
    Score,
    by_reward,
    token_log_ratios,
    weighted_implicit_reward,
)
from bonbon.decoding.stepwise import REJECTED, ScoredRows, Stepwise, best_first, best_whole
from bonbon.decoding.strategy import Floats, Generation, Source, StepwiseSource
from bonbon.groups.group import Group, joined
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Cost

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward


def children(parents: int, places: int) -> list[int]:
    """Share `places` out among parents as equally as possible, extra ones to the best first."""
    return [places // parents + (index < places % parents) for index in range(parents)]


def next_layer(scores: Floats, finished: Sequence[bool], branch: int) -> list[int]:
    """Return the rows of the next layer in the order of their parents, as many as before.

    The ⌈n/branch⌉ best stay, of tied ones the earlier. Finished ones among them are leaves and stay
    unchanged. The others share the remaining places as equally as possible, extra places going to
    the better ones. If all are finished, only these leaves stay.
    """
    kept = best_first(scores)[: -(-len(scores) // branch)].tolist()
    parents = [row for row in kept if not finished[row]]
    copies = dict.fromkeys(kept, 1)
    if parents:
        shares = children(len(parents), len(scores) - (len(kept) - len(parents)))
        copies.update(zip(parents, shares, strict=True))
    return [row for row in sorted(kept) for _ in range(copies[row])]


class TreeBoN(Stepwise):
    """Draw n rows; after each layer keep the best ⌈n/branch⌉ and branch them to n rows again.

    Qiu et al. 2024, arXiv 2410.16033 (there N = n, N_children = `branch`). A layer is
    ⌈max_new_tokens/layers⌉ tokens long. A branch shares its parent's cache lines, so nothing is
    read twice, and draws from a random stream of its own. The answer is the whole completion with
    the largest reward. `branch` 1 or one layer is best-of-n at the same cost.

    A finished completion is a leaf: it competes for a place in the next layer and is not branched;
    the places left over go to the others' children (`next_layer`). A leaf without a place can still
    be the answer, since keeping it costs nothing. A pruned partial completion stays in the group,
    after the others, with the finish reason `rejected` and its last partial score.
    """

    loads: ClassVar[frozenset[str]] = frozenset({"partial"})

    layers: int = Field(4, ge=1, le=64, description="segments of equal length")
    branch: int = Field(4, ge=1, le=LARGEST_N, description="children of each row that is kept")
    partial: Partial = Field(
        "reward",
        description="what partial completions are scored by: reward, or {implicit: MODEL} for the "
        "weighted log-ratio of a tuned model to the base model",
    )

    def score(self, source: Source, reward: Reward) -> Score:
        """See `Stepwise.score`."""
        if self.partial == "reward":
            return by_reward(reward)
        log_ratios = token_log_ratios(self.partial.implicit, source)
        return lambda group, _: np.array([weighted_implicit_reward(r) for r in log_ratios(group)])

    def answer(
        self, prompt: EncodedPrompt, source: StepwiseSource, score: Score, reward: Reward
    ) -> Generation:
        """See `Stepwise.answer`."""
        n, segment = source.config.n, -(-source.config.max_new_tokens // self.layers)
        rows = ScoredRows(source.start(prompt, n), score)
        rows.draw(segment)
        while rows.unfinished:
            if self.branch > 1:
                scores = np.array(rows.scored().rewards)
                rows.select(next_layer(scores, rows.rows.finished, self.branch))
            rows.draw(segment)
        if self.partial == "reward":
            group = joined([rows.scored(), *rows.left])
            return Generation(group, best_whole(group), rows.cost())
        unscored = rows.rows.group().with_rewards([math.nan] * rows.n)
        group, calls = _with_final_rewards(joined([unscored, *rows.left]), reward)
        return Generation(group, best_whole(group), rows.cost() + Cost(reward_calls=calls))


def _with_final_rewards(group: Group, reward: Reward) -> tuple[Group, int]:
    """Score the whole completions of a group; return the group and their number."""
    whole = [row for row, why in enumerate(group.finish_reasons) if why != REJECTED]
    rewards = np.array(group.rewards)
    rewards[whole] = by_reward(reward)(group.take(whole), [True] * len(whole))
    return group.with_rewards(rewards), len(whole)
