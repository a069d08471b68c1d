"""The objectives by name, and their input: the log-probabilities of a batch of groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bonbon.config.training import TrainConfig
from bonbon.objectives.pairs import bonbon, bonbon_dpo, dpo, ipo, ipo_bon, sft_bon
from bonbon.objectives.ranks import (
    bonbon_ranks,
    rank_regression,
    rank_regression_huber,
    rank_regression_pointwise,
    weighted_sft,
)
from bonbon.objectives.selection import (
    Selector,
    all_completions,
    best,
    best_and_random,
    best_and_worst,
    random_pair,
)
from bonbon.tilt.base import Tilt

if TYPE_CHECKING:  # names are looked up where nothing is computed
    import torch

_DEFAULTS = TrainConfig()


@dataclass(frozen=True)
class GroupLogps:
    """Figures of the completions that an objective uses, tensors of shape (groups, completions).

    `logps` and `ref_logps` are log-probabilities summed over tokens, in nats, under the policy and
    the base model. Objectives of a pair have the better completion in the first column.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    rewards: torch.Tensor

    def pair(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (better, worse, ref_better, ref_worse), each of shape (groups,).

        Raises ValueError where the groups do not have two completions.
        """
        if self.logps.shape[1] != 2:
            raise ValueError(f"this objective needs two completions, got {self.logps.shape[1]}")
        return *self.logps.unbind(dim=1), *self.ref_logps.unbind(dim=1)  # type: ignore[return-value]

    def ranks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (logps, ref_logps, rewards), for the objectives of all ranks."""
        return self.logps, self.ref_logps, self.rewards


@dataclass(frozen=True)
class ObjectiveSettings:
    """The numbers an objective may need.

    `n`: completions drawn for each group; `tilt`: the tilt to aim at; `alpha`: the weight of the
    likelihood part; `beta`: that of the DPO and IPO baselines; `delta`: Huber's, in nats.
    """

    n: int
    tilt: Tilt
    alpha: float = _DEFAULTS.alpha
    beta: float = _DEFAULTS.beta
    delta: float = _DEFAULTS.arguments.delta


@dataclass(frozen=True)
class Objective:
    """A named objective: its losses, and which completions of a group it uses.

    Attributes:
        loss: maps the groups' figures to losses of shape (groups,).
        select: takes the completions of a group that `loss` uses.
        any_tilt: whether it can aim at any tilt, or only at the best of the n drawn.
        compares: whether it compares the policy's log-probabilities with the base model's.
        tilt: the name of the tilt that it aims at by default.
    """

    loss: Callable[[GroupLogps, ObjectiveSettings], torch.Tensor]
    select: Selector = best_and_worst
    any_tilt: bool = False
    compares: bool = True
    tilt: str = "best_of_n"


def _of_ranks(loss: Callable[[GroupLogps, ObjectiveSettings], torch.Tensor]) -> Objective:
    return Objective(loss, all_completions, any_tilt=True, tilt="optimal")


OBJECTIVES: dict[str, Objective] = {
    "bonbon": Objective(lambda g, s: bonbon(*g.pair(), n=s.n, alpha=s.alpha)),
    "sft_bon": Objective(lambda g, s: sft_bon(g.logps[:, 0]), best, compares=False),
    "ipo_bon": Objective(lambda g, s: ipo_bon(*g.pair(), n=s.n)),
    "bonbon_dpo": Objective(lambda g, s: bonbon_dpo(*g.pair(), n=s.n, alpha=s.alpha)),
    "bonbon_ranks": _of_ranks(lambda g, s: bonbon_ranks(*g.ranks(), s.tilt, s.alpha)),
    "rank_regression": _of_ranks(lambda g, s: rank_regression(*g.ranks(), s.tilt)),
    "rank_regression_pointwise": _of_ranks(
        lambda g, s: rank_regression_pointwise(*g.ranks(), s.tilt)
    ),
    "rank_regression_huber": _of_ranks(
        lambda g, s: rank_regression_huber(*g.ranks(), s.tilt, s.delta)
    ),
    "weighted_sft": Objective(
        lambda g, s: weighted_sft(g.logps, g.rewards, s.tilt),
        all_completions,
        any_tilt=True,
        compares=False,
    ),
    "dpo": Objective(lambda g, s: dpo(*g.pair(), beta=s.beta)),
    "dpo_best_random": Objective(lambda g, s: dpo(*g.pair(), beta=s.beta), best_and_random),
    "dpo_random_pair": Objective(lambda g, s: dpo(*g.pair(), beta=s.beta), random_pair),
    "ipo": Objective(lambda g, s: ipo(*g.pair(), beta=s.beta)),
    "ipo_best_random": Objective(lambda g, s: ipo(*g.pair(), beta=s.beta), best_and_random),
    "ipo_random_pair": Objective(lambda g, s: ipo(*g.pair(), beta=s.beta), random_pair),
}


def group_metrics(group: GroupLogps) -> dict[str, torch.Tensor]:
    """Compute what is logged beside the loss, each of shape (groups,).

    `sft_loss`: −ln π of the best completion, nats; `best_log_ratio`: its ln π/π0, nats. Where the
    objective uses several completions also `margin`: the best one's log-ratio minus the worst
    one's, nats; `accuracy`: the share of pairs with different rewards whose log-ratios are in the
    rewards' order.
    """
    log_ratios = group.logps - group.ref_logps
    at_best = group.rewards.argmax(dim=1, keepdim=True)
    best_ratio = log_ratios.gather(1, at_best).squeeze(1)
    metrics = {
        "sft_loss": -group.logps.gather(1, at_best).squeeze(1),
        "best_log_ratio": best_ratio,
    }
    if group.logps.shape[1] > 1:
        at_worst = group.rewards.argmin(dim=1, keepdim=True)
        better = group.rewards[:, :, None] > group.rewards[:, None, :]
        higher = log_ratios[:, :, None] > log_ratios[:, None, :]
        metrics["margin"] = best_ratio - log_ratios.gather(1, at_worst).squeeze(1)
        metrics["accuracy"] = (better & higher).sum((1, 2)) / better.sum((1, 2))
    return metrics
