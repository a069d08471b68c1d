"""Training objectives: pure functions of log-probabilities summed over tokens, one an objective.

A log-probability is ln π(y | x), summed over the completion's tokens in nats, under the policy
being trained or under the base model (`ref_…`). Objectives of a pair take tensors of shape
(groups,), one for each side (`best`, `worst`, `chosen`, `rejected`); objectives of all ranks take
`logps`, `ref_logps` and `rewards` of shape (groups, m). Each returns losses of shape (groups,); the
caller averages. Nothing is divided by a length, and no objective has modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bonbon.selection import (
    Select,
    all_completions,
    best,
    best_and_random,
    best_and_worst,
    random_pair,
)
from bonbon.tilt import BestOfN, Tilt, rank_targets, rank_weights

PAPER_ALPHA = 0.005


def bon_target(n: int) -> float:
    """(n−1)·H_{n−1}, the expected log-density ratio of the best of n over the worst, in nats.

    From the tilt: E[ln f(U_(n)) − ln f(U_(1))] for f(u) = n u^(n−1) (Gui et al. 2024, section 4).
    Raises ValueError for n < 2, where best and worst are one completion.
    """
    if n < 2:
        raise ValueError(f"best against worst needs n >= 2 completions, got n = {n}")
    return float(BestOfN(n).rank_log_ratio(n, 1, n))


def bon_beta(n: int) -> float:
    """The IPO β with target 1/(2β) = (n−1)·H_{n−1}: 0.0275 for n = 8."""
    return 1 / (2 * bon_target(n))


def sft_bon(best: torch.Tensor) -> torch.Tensor:
    """−ln π(y_best): maximum likelihood on the best of n (the paper's SFT-BoN)."""
    return -best


def ipo_bon(
    best: torch.Tensor,
    worst: torch.Tensor,
    ref_best: torch.Tensor,
    ref_worst: torch.Tensor,
    n: int,
) -> torch.Tensor:
    """(ln[π(y_b)/π(y_w)] − ln[π0(y_b)/π0(y_w)] − (n−1)H_{n−1})² (the paper's IPO-BoN).

    The target is right on average over the pair's ranks, not for each pair, so the loss's exact
    minimiser is not best-of-n: at n = 8, with continuous rewards and unlimited data, it wins 0.8137
    at 0.8785 nats where best-of-8 wins 0.8889 at 1.2044. At the best-of-n policy itself the loss is
    the variance of the pair's log-ratio, (n−1)² Σ_{k<n} 1/k² = 74.1 for n = 8, not 0.
    """
    return ((best - worst) - (ref_best - ref_worst) - bon_target(n)) ** 2


def bonbon(
    best: torch.Tensor,
    worst: torch.Tensor,
    ref_best: torch.Tensor,
    ref_worst: torch.Tensor,
    n: int,
    alpha: float = PAPER_ALPHA,
) -> torch.Tensor:
    """α·SFT-BoN + (1−α)·IPO-BoN (Gui et al. 2024, section 4; the paper's α is 0.005)."""
    return alpha * sft_bon(best) + (1 - alpha) * ipo_bon(best, worst, ref_best, ref_worst, n)


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """−ln σ(β (ln[π(y_c)/π0(y_c)] − ln[π(y_r)/π0(y_r)])) (Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """(ln[π(y_c)/π0(y_c)] − ln[π(y_r)/π0(y_r)] − 1/(2β))² (Azar et al. 2023, equation 17).

    On summed log-probabilities, as in the paper. TRL's `ipo` divides them by each completion's
    length first, so its β is another quantity.
    """
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def bonbon_dpo(
    best: torch.Tensor,
    worst: torch.Tensor,
    ref_best: torch.Tensor,
    ref_worst: torch.Tensor,
    n: int,
    alpha: float = PAPER_ALPHA,
) -> torch.Tensor:
    """α·SFT-BoN + (1−α)·DPO at BoNBoN's β.

    What the released code of Gui et al. computes: it passes BoNBoN's α and β on but leaves the
    preference part at the sigmoid loss.
    """
    preference = dpo(best, worst, ref_best, ref_worst, bon_beta(n))
    return alpha * sft_bon(best) + (1 - alpha) * preference


# --- objectives of all ranks ----------------------------------------------------------------------


def rank_regression(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, tilt: Tilt
) -> torch.Tensor:
    """Mean over pairs of ((h_i − h_j) − (t_i − t_j))², with h = ln π − ln π0: every pair's own IPO.

    The same as 2/(m−1)·Σ_i (h_i − h̄ − (t_i − t̄))², centred in the group, with the
    `centred_targets` t. The minimiser wins exactly as often as the tilt, for any m ≥ 2 and any n,
    whole or not, with unlimited data on continuous rewards.
    """
    return pairwise_regression(logps - ref_logps, centred_targets(rewards, tilt))


def rank_regression_pointwise(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, tilt: Tilt
) -> torch.Tensor:
    """Mean over completions of (h_i − t_i)², t = `log_density_targets`: nothing is centred.

    With unlimited data and a policy that can be the tilt, the minimiser is `rank_regression`'s; it
    is held to the normalised log-density, not to differences alone.
    """
    targets = log_density_targets(rewards, tilt)
    return ((logps - ref_logps - targets) ** 2).mean(dim=1)


def rank_regression_huber(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    tilt: Tilt,
    delta: float,
) -> torch.Tensor:
    """`rank_regression` with Huber's loss on each centred residual: linear beyond `delta` nats.

    2/(m−1)·Σ_i 2·huber_δ(h_i − h̄ − (t_i − t̄)), which is `rank_regression` as δ grows.
    """
    residuals = _centred(logps - ref_logps - centred_targets(rewards, tilt))
    losses = F.huber_loss(residuals, torch.zeros_like(residuals), reduction="none", delta=delta)
    return 4 * losses.sum(dim=1) / (rewards.shape[1] - 1)


def weighted_sft(logps: torch.Tensor, rewards: torch.Tensor, tilt: Tilt) -> torch.Tensor:
    """−(1/m) Σ_i w_i ln π(y_i), w the tilt's weight of each rank (`bonbon.tilt.rank_weights`).

    For best-of-n with n ≤ m it is SFT on the best of n averaged over all n-subsets of the m draws:
    the same mean as SFT-BoN's on n draws at less variance (Rao-Blackwell). At n = m it is SFT-BoN.
    Other tilts have plug-in weights, which m draws smooth: best-of-32 from 8 wins 0.887, not 0.970.
    """
    return -(tie_weights(rewards, tilt) * logps).mean(dim=1)


def bonbon_ranks(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    tilt: Tilt,
    alpha: float = PAPER_ALPHA,
) -> torch.Tensor:
    """α·`weighted_sft` + (1−α)·`rank_regression`: BoNBoN with all ranks in both its parts."""
    regression = rank_regression(logps, ref_logps, rewards, tilt)
    return alpha * weighted_sft(logps, rewards, tilt) + (1 - alpha) * regression


def pairwise_regression(log_ratios: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the pairs of a group of ((h_i − h_j) − (t_i − t_j))², shape (groups,).

    Computed as 2/(m−1)·Σ_i (h_i − h̄ − (t_i − t̄))². With the best and the worst of n alone, at
    best-of-n's expected log-densities of ranks n and 1, this is `ipo_bon`.
    """
    residuals = _centred(log_ratios - targets)
    return 2 * (residuals**2).sum(dim=1) / (log_ratios.shape[1] - 1)


def log_density_targets(rewards: torch.Tensor, tilt: Tilt) -> torch.Tensor:
    """Each completion's target for ln π − ln π0 by its rank in the group (`tilt.rank_targets`).

    Completions that tie share the logarithm of their ranks' mean density, as a plateau of the
    reward shares its mass. (A mean of the targets themselves would be far off: with binary rewards
    of probability ½ and n = m = 8, best-of-n puts 5.5 nats between the two values; mixed groups
    get 6.1 by mean density and 9.1 by mean target.)

    Args:
        rewards: (groups, m), finite.
    Returns: (groups, m), float64.
    """
    order, level = _levels(rewards)
    values = torch.tensor(rank_targets(tilt, rewards.shape[1])).to(order.device).expand(order.shape)
    top = torch.full_like(values, -torch.inf).scatter_reduce(1, level, values, "amax")
    densities = _level_means((values - top.gather(1, level)).exp(), level)
    shared = (densities.log() + top).gather(1, level)
    return torch.zeros_like(shared).scatter(1, order, shared)


def centred_targets(rewards: torch.Tensor, tilt: Tilt) -> torch.Tensor:
    """(m−1)/m times `log_density_targets`, for regressions that are centred in the group.

    A draw is part of its own group's mean: with quantile u it has
    E[h_i − h̄] = (1 − 1/m)(h(u) − E h), so with the targets themselves the minimiser would overshoot
    by m/(m−1) (at n = m = 8 it would win 0.900 at 1.308 nats).
    """
    m = rewards.shape[1]
    return log_density_targets(rewards, tilt) * (m - 1) / m


def tie_weights(rewards: torch.Tensor, tilt: Tilt) -> torch.Tensor:
    """Each completion's weight by its rank (`tilt.rank_weights`), shared evenly between ties.

    Shapes as in `log_density_targets`; a group's weights sum to m.
    """
    order, level = _levels(rewards)
    weights = torch.tensor(rank_weights(tilt, rewards.shape[1]).copy()).to(order.device)
    shared = _level_means(weights.expand(order.shape), level).gather(1, level)
    return torch.zeros_like(shared).scatter(1, order, shared)


# --- what the trainer and the configuration select from -------------------------------------------


@dataclass(frozen=True)
class GroupLogps:
    """Of each group the completions that an objective uses, all tensors (groups, completions).

    `logps` and `ref_logps` are summed log-probabilities in nats under the policy and the base
    model. Objectives of a pair find the better completion in the first column.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    rewards: torch.Tensor

    def pair(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(better, worse, ref_better, ref_worse), each (groups,). ValueError if it is no pair."""
        if self.logps.shape[1] != 2:
            raise ValueError(f"this objective needs two completions, got {self.logps.shape[1]}")
        return *self.logps.unbind(dim=1), *self.ref_logps.unbind(dim=1)  # type: ignore[return-value]

    def ranks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logps, ref_logps, rewards), for the objectives of all ranks."""
        return self.logps, self.ref_logps, self.rewards


@dataclass(frozen=True)
class ObjectiveSettings:
    """The numbers an objective may need.

    `n` completions a group were drawn; `tilt` is aimed at; `alpha` weighs the likelihood part;
    `beta` is that of the DPO and IPO baselines; `delta` (nats) is Huber's.
    """

    n: int
    tilt: Tilt
    alpha: float = PAPER_ALPHA
    beta: float = 0.1
    delta: float = 4.0


@dataclass(frozen=True)
class Objective:
    """A named objective: its losses, and which completions of a group it uses.

    `any_tilt` says whether it can aim at any tilt or only at the best of the n drawn; `compares`,
    whether it compares the policy's log-probabilities with the base model's; `tilt` is the one that
    it aims at unless told otherwise.
    """

    loss: Callable[[GroupLogps, ObjectiveSettings], torch.Tensor]
    select: Select = best_and_worst
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
    """What is logged beside the loss, each of shape (groups,).

    `sft_loss` (−ln π of the best), `best_log_ratio` (its ln π/π0, nats), and where the objective
    uses more than one completion `margin` (the best's log-ratio over the worst's, nats) and
    `accuracy` (the share of pairs, ties left out, whose log-ratios are in the rewards' order).
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


# --- ranks and ties -------------------------------------------------------------------------------


def _centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _levels(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts each group, and in that order each completion's reward level, from 0."""
    ordered, order = rewards.sort(dim=1, stable=True)
    is_new = ordered[:, 1:] != ordered[:, :-1]
    level = torch.cat([torch.zeros_like(order[:, :1]), is_new.long().cumsum(dim=1)], dim=1)
    return order, level


def _level_means(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Means of (groups, m) values over each level, at column `level`; NaN in columns of none."""
    zeros = torch.zeros_like(values)
    counts = zeros.scatter_add(1, level, torch.ones_like(values))
    return zeros.scatter_add(1, level, values) / counts
