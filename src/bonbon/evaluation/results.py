"""The results of an evaluation, as plain frozen values; `evaluation.json` holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bonbon.evaluation.best_of_k import BestOfK
from bonbon.evaluation.figures import Figure
from bonbon.groups.group import Group


@dataclass(frozen=True)
class JudgeFigures:
    """A judge's win rate, and the number of comparisons.

    `unreadable` of the `comparisons` have no readable verdict; the win rate leaves them out.
    """

    win_rate: Figure | None
    comparisons: int
    unreadable: int


@dataclass(frozen=True)
class HumanText:
    """A model's perplexity (per token) on human text, and the change in nats a token.

    The change is None where the model tokenises texts differently from the base.
    """

    perplexity: Figure
    bits_per_byte: Figure
    forgetting: Figure | None


@dataclass(frozen=True)
class ModelEvaluation:
    """The figures of one policy; `None` where one is undefined or was not measured.

    `win_rate` is against the base model, `kl` is KL(policy ‖ base) in nats (Rao-Blackwellised, one
    of the `kl_estimates`), `forward_kl` is KL(base ‖ policy), `length` and `length_change` (from
    the base model) count tokens, `tokens_per_answer` counts all tokens drawn for one answer,
    `win_rate_by` has the win rate by each further reward, `win_rate_loss_by` the win rate minus
    that (paired over prompts), `tie_rate` the share of pairs with the base that tie, `drift` the
    change of each off-target metric from the base model. `best_of` is the number of draws of which
    the policy keeps the best.
    """

    win_rate: Figure
    kl: Figure | None
    recovered: Figure
    kl_efficiency: Figure | None
    length: Figure
    length_change: Figure
    tokens_per_answer: Figure
    win_rate_by: Mapping[str, Figure] = field(default_factory=dict)
    win_rate_loss_by: Mapping[str, Figure] = field(default_factory=dict)
    tie_rate: Figure | None = None
    best_of: int | None = None
    length_controlled_win_rate: Figure | None = None
    kl_estimates: Mapping[str, Figure] = field(default_factory=dict)
    forward_kl: Mapping[str, Figure] | None = None
    metrics: Mapping[str, Figure] = field(default_factory=dict)
    drift: Mapping[str, Figure] = field(default_factory=dict)
    drift_at_equal_win_rate: Mapping[str, Figure | None] = field(default_factory=dict)
    judge: JudgeFigures | None = None
    human_text: HumanText | None = None
    tasks: Sequence[Mapping[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as in `evaluation.json`."""
        return asdict(self)


@dataclass(frozen=True)
class BestOfNKL:
    """KL(best-of-n ‖ base) in nats: the bound ln n − (n−1)/n, Beirami's estimate, the exact value.

    The exact value is known only where the draws include all completions of the base model.
    """

    bound: float
    beirami: Figure
    exact: float | None


@dataclass(frozen=True)
class PairEvaluation:
    """A pair of policies: the win rate of the first, and the difference of their win rates."""

    ours: str
    theirs: str
    win_rate: Figure
    difference: Figure


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Draws:
    """A policy's scored groups; its answer is the best of `best_of` draws, or any draw (1).

    `forward` are the base's completions with the metrics `kl…` of KL(base ‖ policy), if measured.
    """

    groups: Sequence[Group]
    best_of: int = 1
    forward: Sequence[Group] | None = None

    def on_prompts(self, ids: Collection[str]) -> Draws:
        """Return the draws for these prompts alone, in their order."""

        def kept(groups: Sequence[Group]) -> list[Group]:
            return [group for group in groups if group.prompt_id in ids]

        forward = None if self.forward is None else kept(self.forward)
        return Draws(kept(self.groups), self.best_of, forward)


@dataclass(frozen=True)
class Evaluation:
    """A comparison of policies on the same prompts; `models` has base and best-of-n first.

    `equal_win_rate` is the win rate at which `drift_at_equal_win_rate` compares, None where fewer
    than two policies win with confidence.
    """

    n: int
    k: int
    prompts: int
    models: Mapping[str, ModelEvaluation]
    best_of_k: Sequence[BestOfK]
    best_of_n_kl: BestOfNKL
    pairs: Sequence[PairEvaluation]
    equal_win_rate: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as in `evaluation.json`."""
        return asdict(self)
