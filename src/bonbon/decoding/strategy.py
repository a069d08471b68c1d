"""The contract of a strategy: settings that spend n draws and choose one completion.

A strategy is an immutable value, like a tilt: its fields are its configuration, and the number of
candidates is always `sampling.n` (the mean number for best-of-Poisson, the most for adaptive n,
particles, rows or leaves elsewhere). Nothing here needs torch.

Two kinds differ in what they need:

- *whole draws*: the candidates are independent draws of the base model, and the strategy is a
  distribution over a scored group. Works with every `Source`, a server included.
- *stepwise*: rows are dropped or branched while they are drawn, which takes a `StepwiseSource`: a
  model in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bonbon.config.sampling import SamplingConfig
from bonbon.config.settings import Settings
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Candidates, Cost, timed
from bonbon.sampling.random_streams import uniform_stream

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward
    from bonbon.sampling.generation_loop import Rows


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Generation:
    """A prompt's answer: its candidates, the index of the chosen one, and the cost.

    `group.rewards` are the rewards of the choice (None if no reward was needed). A candidate that
    was dropped before its end has the finish reason `rejected` and its last partial reward; it is
    never chosen.
    """

    group: Group
    chosen: int
    cost: Cost

    @property
    def completion(self) -> str:
        """The chosen completion."""
        return self.group.completions[self.chosen]

    @property
    def reward(self) -> float | None:
        """The chosen completion's reward."""
        return None if self.group.rewards is None else self.group.rewards[self.chosen]

    def ranking(self) -> list[int]:
        """Return all whole candidates: the chosen one, then by falling reward, then as drawn."""
        rewards = self.group.rewards or (0.0,) * self.group.n
        whole = [i for i, why in enumerate(self.group.finish_reasons) if why != "rejected"]
        return sorted(whole, key=lambda i: (i != self.chosen, -rewards[i], i))


class Source(Protocol):
    """A source of whole completions: a model in this process, or a server."""

    @property
    def config(self) -> SamplingConfig:
        """The sampling settings; a strategy may draw `config.n` candidates."""
        ...

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        """Return the completions numbered `ks[i]` of the i-th prompt's draws, unscored.

        Requests to a server may fail, so a group may hold fewer. It may hold none if earlier draws
        of the same prompt have arrived.
        """
        ...

    def embed(self, group: Group) -> Floats:
        """Return an embedding of each completion, (n, width). Raises BonbonError if it cannot."""
        ...


@runtime_checkable
class StepwiseSource(Source, Protocol):
    """A source whose rows can be dropped and branched while they are drawn."""

    def start(self, prompt: EncodedPrompt, n: int) -> Rows:
        """Return n rows of a prompt, prefilled once, with nothing drawn yet."""
        ...


class Strategy(Settings):
    """Base of all strategies; each subclass has an entry in `STRATEGIES`."""

    needs_reward: ClassVar[bool] = True
    needs_logprobs: ClassVar[bool] = False  # if True, a server is asked for them
    stepwise: ClassVar[bool] = False
    # Whether the candidates are n independent draws of the base model, as training needs.
    independent: ClassVar[bool] = True
    # Settings that name code or models to load; a server's requests must not change them.
    loads: ClassVar[frozenset[str]] = frozenset()

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """Return one generation a prompt, in the order of `prompts`.

        Raises BonbonError when the source lacks what the strategy needs, and for rewards that are
        not finite.
        """
        raise NotImplementedError


class WholeDraws(Strategy):
    """Base of strategies that draw whole completions, score them, and choose one by `weights`."""

    def count(self, prompt: EncodedPrompt, config: SamplingConfig) -> int:
        """Return how many completions of this prompt are drawn."""
        return config.n

    def weights(self, group: Group, source: Source) -> Floats:
        """Return the probability of choosing each candidate, (n,); sums to 1."""
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """See `Strategy.generate`."""
        ks = [range(self.count(prompt, source.config)) for prompt in prompts]
        candidates = source.draw(prompts, ks)
        if reward is not None:
            candidates = score(candidates, reward)
        with_time = [timed(self._choose, item, source) for item in candidates]
        return [
            Generation(item.group, chosen, item.cost + Cost(seconds=seconds))
            for item, (chosen, seconds) in zip(candidates, with_time, strict=True)
        ]

    def _choose(self, drawn: Candidates, source: Source) -> int:
        return pick(self.weights(drawn.group, source), source.config.seed, drawn.group.prompt_id)


def one_hot(index: int, n: int) -> Floats:
    """Return the distribution that always chooses `index`, (n,)."""
    weights = np.zeros(n)
    weights[index] = 1.0
    return weights


def pick(weights: Floats, seed: int, prompt_id: str) -> int:
    """Draw an index from `weights` by the inverse CDF; the same for the same seed and prompt."""
    uniform = uniform_stream(seed, "choice", prompt_id, 0, 1)[0]
    cdf = np.cumsum(weights)
    index = int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def score(candidates: Sequence[Candidates], reward: Reward) -> list[Candidates]:
    """Score all candidates in one call of the reward, and add its cost to theirs."""
    from bonbon.rewards.reward import score_groups

    total = sum(item.group.n for item in candidates)
    if total == 0:
        return [Candidates(item.group.with_rewards(()), item.cost) for item in candidates]
    rewards, seconds = timed(score_groups, reward, [item.group for item in candidates])
    return [
        Candidates(
            item.group.with_rewards(values),
            item.cost + Cost(reward_calls=item.group.n, seconds=seconds * item.group.n / total),
        )
        for item, values in zip(candidates, rewards, strict=True)
    ]
