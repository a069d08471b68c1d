"""Objectives of all completions of a group, weighted or regressed on their ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.config.training import PAPER_ALPHA
from bonbon.tilt.base import Tilt
from bonbon.tilt.ranks import rank_targets, rank_weights

if TYPE_CHECKING:  # imported where it is used: names of objectives are looked up without it
    import torch


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
    from torch.nn.functional import huber_loss

    residuals = _centred(logps - ref_logps - centred_targets(rewards, tilt))
    losses = huber_loss(
        residuals, residuals.new_zeros(residuals.shape), reduction="none", delta=delta
    )
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
    import torch

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
    import torch

    order, level = _levels(rewards)
    weights = torch.tensor(rank_weights(tilt, rewards.shape[1]).copy()).to(order.device)
    shared = _level_means(weights.expand(order.shape), level).gather(1, level)
    return torch.zeros_like(shared).scatter(1, order, shared)


def _centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _levels(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts each group, and in that order each completion's reward level, from 0."""
    import torch

    ordered, order = rewards.sort(dim=1, stable=True)
    is_new = ordered[:, 1:] != ordered[:, :-1]
    level = torch.cat([torch.zeros_like(order[:, :1]), is_new.long().cumsum(dim=1)], dim=1)
    return order, level


def _level_means(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Means of (groups, m) values over each level, at column `level`; NaN in columns of none."""
    import torch

    zeros = torch.zeros_like(values)
    counts = zeros.scatter_add(1, level, torch.ones_like(values))
    return zeros.scatter_add(1, level, values) / counts
