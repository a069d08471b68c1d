"""Measuring policies against the base model and against best-of-n itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.evaluation.win_rates import best_of_n_win_rate, win_rate
from bonbon.groups import Group
from bonbon.tilt import BestOfN, best_of_n_rank_weights, optimal_kl


@dataclass(frozen=True)
class ModelEvaluation:
    """What is known of one model; `None` where a figure has no meaning (the base's efficiency).

    `win_rate` is against the base model, `kl` is KL(model ‖ base) in nats, `length` and
    `length_change` (over the base model) count tokens, `tokens_per_answer` counts all tokens drawn
    for one answer, `win_rate_by` has the win rate by each further reward.
    """

    win_rate: Figure
    kl: Figure
    recovered: Figure
    kl_efficiency: Figure | None
    length: Figure
    length_change: Figure
    tokens_per_answer: Figure
    win_rate_by: Mapping[str, Figure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `evaluation.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the same prompts against the same base completions.

    Args:
        base: one scored group a prompt from the base model, of k + n completions: the first k are
            what models are compared with, all of them serve best-of-n's own win rate. Raises
            ValueError for fewer.
        n: of best-of-n.
        k: completions of each model a prompt.
        resamples: of the bootstrap.
    """

    base: Sequence[Group]
    n: int
    k: int
    resamples: int = 2000

    def __post_init__(self) -> None:
        _check_draws(self.base, self.k + self.n, "base")

    def best_of_n(self) -> ModelEvaluation:
        """Best-of-n itself; its KL is the closed form, which ties and repetitions only lower."""
        wins = self._best_of_n_wins()
        kl = BestOfN(self.n).kl()
        lengths = self._lengths(self.base)
        chosen = self._best_of_n_lengths()
        return ModelEvaluation(
            win_rate=self._mean(wins),
            kl=Figure.exact(kl),
            recovered=Figure.exact(1.0),
            kl_efficiency=self._figure(lambda win: kl_efficiency(win, kl), wins),
            length=self._mean(chosen),
            length_change=self._mean(chosen - lengths),
            tokens_per_answer=self._mean(self.n * lengths),
            win_rate_by={
                name: self._mean(self._best_of_n_wins(name)) for name in self._further_rewards()
            },
        )

    def base_model(self) -> ModelEvaluation:
        """The base model against itself."""
        half, nothing = Figure.exact(0.5), Figure.exact(0.0)
        lengths = self._mean(self._lengths(self.base))
        return ModelEvaluation(
            win_rate=half,
            kl=nothing,
            recovered=nothing,
            kl_efficiency=None,
            length=lengths,
            length_change=nothing,
            tokens_per_answer=lengths,
            win_rate_by=dict.fromkeys(self._further_rewards(), half),
        )

    def model(self, groups: Sequence[Group]) -> ModelEvaluation:
        """A trained model, from its scored groups with the metric `kl`.

        *recovered* = (win − ½)/(best-of-n's win − ½); *KL efficiency* = the least KL with which a
        rank-based tilt wins as often / the measured KL (0 when it wins half or less).
        Raises ValueError when the prompts are not the base groups' prompts, in their order.
        """
        _check_draws(groups, self.k, "model")
        if [group.prompt_id for group in groups] != [group.prompt_id for group in self.base]:
            raise ValueError("the model's groups and the base's are of different prompts")
        wins, kl = self._wins(groups), self._metric(groups, "kl")
        lengths = self._lengths(groups)
        best = self._best_of_n_wins()
        return ModelEvaluation(
            win_rate=self._mean(wins),
            kl=self._mean(kl),
            recovered=self._figure(_recovered, wins, best),
            kl_efficiency=self._figure(kl_efficiency, wins, kl),
            length=self._mean(lengths),
            length_change=self._mean(lengths - self._lengths(self.base)),
            tokens_per_answer=self._mean(lengths),
            win_rate_by={
                name: self._mean(self._wins(groups, name)) for name in self._further_rewards()
            },
        )

    def _further_rewards(self) -> list[str]:
        return [name for name in self.base[0].metrics if name != "kl"]

    def _wins(self, groups: Sequence[Group], reward: str | None = None) -> Floats:
        pairs = zip(groups, self.base, strict=True)
        return np.array(
            [
                win_rate(_rewards(ours, reward)[: self.k], _rewards(base, reward)[: self.k])
                for ours, base in pairs
            ]
        )

    def _best_of_n_wins(self, reward: str | None = None) -> Floats:
        return np.array(
            [
                best_of_n_win_rate(_rewards(group, None), _rewards(group, reward), self.n)
                for group in self.base
            ]
        )

    def _best_of_n_lengths(self) -> Floats:
        def expected(group: Group) -> float:
            rewards, lengths = _rewards(group, None), np.array(group.lengths(), np.float64)
            order = np.argsort(rewards, kind="stable")
            return float(best_of_n_rank_weights(group.n, self.n) @ lengths[order])

        return np.array([expected(group) for group in self.base])

    def _lengths(self, groups: Sequence[Group]) -> Floats:
        return np.array([np.mean(group.lengths()) for group in groups])

    def _metric(self, groups: Sequence[Group], name: str) -> Floats:
        return np.array([np.mean(group.metrics[name]) for group in groups])

    def _mean(self, per_prompt: Floats) -> Figure:
        return self._figure(lambda mean: mean, per_prompt)

    def _figure(self, statistic: Callable[..., ArrayLike], *per_prompt: Floats) -> Figure:
        return bootstrap(per_prompt, statistic, self.resamples)


def _check_draws(groups: Sequence[Group], wanted: int, whose: str) -> None:
    for group in groups:
        if group.n < wanted:
            raise ValueError(
                f"the {whose} group {group.prompt_id} has {group.n} completions, not {wanted}"
            )


def _rewards(group: Group, name: str | None) -> Floats:
    values = group.rewards if name is None else group.metrics[name]
    return np.asarray(values, dtype=np.float64)


def _recovered(win: ArrayLike, best: ArrayLike) -> Floats:
    gain = np.asarray(best) - 0.5
    # A reward that tells nothing apart gives best-of-n nothing to gain.
    return np.divide(np.asarray(win) - 0.5, gain, out=np.zeros_like(gain), where=gain > 0)


def kl_efficiency(win: ArrayLike, kl: ArrayLike) -> Floats:
    """The least KL for a win rate over the KL spent (nats), elementwise; 0 for half or less."""
    wins, kls = np.broadcast_arrays(np.asarray(win, np.float64), np.asarray(kl, np.float64))
    gains = (wins > 0.5) & (kls > 0)
    # At a win rate of 1 in a sample the least KL would be infinite; the sample cannot tell.
    least = optimal_kl(np.clip(wins, 0.5, 1 - 1e-6))
    return np.asarray(np.where(gains, least / np.where(kls > 0, kls, 1.0), 0.0))
