"""Adaptive n: draw for a prompt as long as a further draw is worth its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from bonbon.config.training import LARGEST_N
from bonbon.decoding.strategy import Floats, Generation, Source, Strategy, score
from bonbon.groups.group import Group, joined
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Candidates

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward


def expected_gain(rewards: ArrayLike) -> float:
    """Estimate the expected growth of the best reward with draw k + 1, from k rewards.

    The expected growth G_m = E[max of m] − E[max of m − 1] has an unbiased estimate for each
    m ≤ k, the mean over all subsets of the draws: with r_(1) ≤ … ≤ r_(k),

        G_m = Σ_i (r_(i+1) − r_(i)) · C(i, m−1)/C(k, m−1) · (k − i)/(k − m + 1).

    For m = k that is (r_(k) − r_(k−1))/k, a single spacing and so mostly noise. Here m = ⌊k/2⌋ + 1,
    which averages many spacings, and the estimate is extrapolated to k + 1 as 1/m, the law of an
    exponential tail (lighter tails gain less, heavier tails more):

        G_(k+1) ≈ G_m · m/(k + 1).

    No distribution is fitted: the expected improvement under a fitted Student-t or normal draws far
    too long where rewards have a ceiling.

    In units of the reward: a shift of all rewards changes nothing, a factor multiplies it. Zero
    where all rewards tie, infinite for fewer than two rewards.
    """
    ordered = np.sort(np.asarray(rewards, dtype=np.float64))
    if len(ordered) < 2:
        return math.inf
    return float(np.diff(ordered) @ _spacing_weights(len(ordered)))


@lru_cache(maxsize=1024)
def _spacing_weights(k: int) -> Floats:
    """Return the weight of each spacing r_(i+1) − r_(i), i = 1..k−1, in `expected_gain`."""
    m = k // 2 + 1
    i = np.arange(k - 1, 0, -1)
    # C(i, m−1) over C(i + 1, m−1); their product from k down is C(i, m−1)/C(k, m−1).
    below = np.cumprod(np.maximum(i - m + 2, 0) / (i + 1))[::-1]
    above = (k - np.arange(1, k)) / (k - m + 1)
    return np.asarray(below * above * m / (k + 1))


class AdaptiveN(Strategy):
    """Draw in rounds until the expected gain of one more draw is below its price.

    A prompt's first round has `min_n` draws, each later round `batch`, never more than n in total.
    Drawing stops when `expected_gain` < price · the mean length so far in tokens (at least 1). The
    best candidate is kept, of tied ones the first drawn. Price 0 is best-of-n. A prompt's draws are
    those of best-of-n, and when it stops does not depend on the other prompts; unfinished prompts
    are drawn together. Each round reads the prompt again, so a larger `batch` reads less.

    For a known distribution of rewards the optimal stopping rule is Weitzman's (1979), whose
    threshold b solves E[(R − b)⁺] = cost; Kalayci et al. 2025 (arXiv 2510.01394) apply it to
    language models. Here only a prompt's few rewards are known, so the rule uses the estimate. It
    cannot foresee rewards that it has not seen: with sparse rewards (0 for nearly all completions)
    the first ones tie, the gain is 0, and drawing stops after `min_n`. Set `min_n` so large that a
    success among so many draws is likely.
    """

    independent: ClassVar[bool] = False  # their number depends on their rewards

    price: float = Field(ge=0, description="price of a token, in units of the reward")
    batch: int = Field(
        4, ge=1, le=LARGEST_N, description="draws a prompt in each round after the first"
    )
    min_n: int = Field(4, ge=2, le=LARGEST_N, description="draws of the first round")

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """See `Strategy.generate`. Raises ValueError without a reward."""
        if reward is None:
            raise ValueError("adaptive n stops and chooses by a reward; pass one")
        candidates: dict[int, Candidates] = {}
        still_open = list(range(len(prompts)))
        for numbers in self.rounds(source.config.n):
            drawn = source.draw([prompts[i] for i in still_open], [numbers] * len(still_open))
            for i, new in zip(still_open, score(drawn, reward), strict=True):
                candidates[i] = _with(candidates[i], new) if i in candidates else new
            still_open = [i for i in still_open if self.keeps_drawing(candidates[i].group)]
            if not still_open:
                break
        best = [int(np.argmax(candidates[i].group.rewards or ())) for i in range(len(prompts))]
        return [Generation(candidates[i].group, k, candidates[i].cost) for i, k in enumerate(best)]

    def rounds(self, n: int) -> list[range]:
        """Return which of a prompt's n draws each round makes."""
        first = n if self.price == 0 else min(self.min_n, n)
        return [
            range(start, stop) for start, stop in pairwise([0, *range(first, n, self.batch), n])
        ]

    def keeps_drawing(self, group: Group) -> bool:
        """Return whether a further draw is worth its price.

        Failed draws count towards n, but not towards `min_n`.
        """
        assert group.rewards is not None
        tokens = max(sum(group.lengths()) / group.n, 1.0)
        return group.n < self.min_n or expected_gain(group.rewards) >= self.price * tokens


def _with(old: Candidates, new: Candidates) -> Candidates:
    """Join two sets of candidates of one prompt."""
    return Candidates(joined([old.group, new.group]), old.cost + new.cost)
