"""Objectives of two completions a group: BoNBoN, SFT, IPO and DPO on best against worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.config.training import PAPER_ALPHA as PAPER_ALPHA
from bonbon.tilt.best_of_n import BestOfN

if TYPE_CHECKING:
    import torch


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
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


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
