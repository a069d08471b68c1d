"""What an evaluation finds, as plain frozen values; `evaluation.json` is made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bonbon.evaluation.best_of_k import BestOfK
from bonbon.evaluation.figures import Figure
from bonbon.groups.group import Group


@dataclass(frozen=True)
class JudgeFigures:
    """A judge's verdicts: the win rate, and how many comparisons it is of.

    `unreadable` of the `comparisons` have no verdict that can be read and are left out of it.
    """

    win_rate: Figure | None
    comparisons: int
    unreadable: int


@dataclass(frozen=True)
class HumanText:
    """Human text under a model: its perplexity (per token), and the change in nats a token.

    The change is None where the model cuts texts into other tokens than the base does.
    """

    perplexity: Figure
    bits_per_byte: Figure
    forgetting: Figure | None


@dataclass(frozen=True)
class ModelEvaluation:
    """What is known of one policy; `None` where a figure has no meaning or was not measured.

    `win_rate` is against the base model, `kl` is KL(policy ‖ base) in nats (Rao-Blackwellised, one
    of the `kl_estimates`), `forward_kl` is KL(base ‖ policy), `length` and `length_change` (over
    the base model) count tokens, `tokens_per_answer` counts all tokens drawn for one answer,
    `win_rate_by` has the win rate by each further reward, `win_rate_loss_by` what it is below the
    win rate (paired over prompts), `tie_rate` the share of pairs with the base that tie, `drift`
    the change of each off-target metric over the base model. `best_of` is the number of draws that
    the policy keeps the best of.
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
        """Plain values, as in `evaluation.json`."""
        return asdict(self)


@dataclass(frozen=True)
class BestOfNKL:
    """KL(best-of-n ‖ base) in nats: the bound ln n − (n−1)/n, Beirami's estimate, the exact value.

    The exact value is known only where the drawn completions are all that the base model can draw.
    """

    bound: float
    beirami: Figure
    exact: float | None


@dataclass(frozen=True)
class PairEvaluation:
    """One policy against another: its win rate, and the difference of their win rates over base."""

    ours: str
    theirs: str
    win_rate: Figure
    difference: Figure


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Draws:
    """A policy's scored groups; it keeps the best of `best_of` draws, or any draw (1).

    `forward` are the base's completions with the metrics `kl…` of KL(base ‖ policy), if measured.
    """

    groups: Sequence[Group]
    best_of: int = 1
    forward: Sequence[Group] | None = None

    def on_prompts(self, ids: Collection[str]) -> Draws:
        """The draws for these prompts alone, in their order."""

        def kept(groups: Sequence[Group]) -> list[Group]:
            return [group for group in groups if group.prompt_id in ids]

        forward = None if self.forward is None else kept(self.forward)
        return Draws(kept(self.groups), self.best_of, forward)


@dataclass(frozen=True)
class Evaluation:
    """Policies side by side on the same prompts; `models` has base and best-of-n first.

    `equal_win_rate` is the win rate at which `drift_at_equal_win_rate` compares, None where fewer
    than two policies win for sure.
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
        """Plain values, as in `evaluation.json`."""
        return asdict(self)
