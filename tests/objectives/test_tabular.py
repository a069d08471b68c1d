"""What the objectives converge to, on a policy small enough to know everything about exactly.

The policy is a softmax over N outcomes with distinct rewards, in float64. Groups are drawn from the
base, the objective functions themselves are minimised over them, and the result is compared with
what enumeration says. No network, no optimiser noise: a wrong sign, target or reference shows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import qmc

from bonbon.objectives.pairs import PAPER_ALPHA, bon_target, bonbon, ipo_bon, sft_bon
from bonbon.objectives.ranks import (
    log_density_targets,
    pairwise_regression,
    rank_regression,
    rank_regression_pointwise,
    tie_weights,
    weighted_sft,
)
from bonbon.tilt.base import Tilt
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.discrete import best_of_n_pmf, kl_pmf, tilted_pmf, win_rate_pmf
from bonbon.tilt.exponential import ExponentialTilt, optimal_kl
from support.tabular import Floats, Loss, minimise

Ints = NDArray[np.intp]

N_BEST = 8


# --- the tabular policy ---------------------------------------------------------------------------


def draw_best_and_worst(p: Floats, groups: int, seed: int) -> tuple[Ints, Ints]:
    """Best and worst of `groups` groups of n draws; outcomes are numbered by ascending reward."""
    draws = np.random.default_rng(seed).choice(len(p), size=(groups, N_BEST), p=p)
    return draws.max(axis=1), draws.min(axis=1)


def variation(p: Floats, q: Floats) -> float:
    return float(np.abs(p - q).sum()) / 2


def rewards(p: Floats) -> Floats:
    return np.arange(len(p), dtype=np.float64)


def win_and_kl(q: Floats, p: Floats) -> tuple[float, float]:
    return win_rate_pmf(q, p, rewards(p)), kl_pmf(q, p)


# --- the population, by enumeration ---------------------------------------------------------------


def joint_best_worst(p: Floats) -> Floats:
    """P(best = a, worst = b) of n draws from p, [a, b]; outcomes are in order of reward."""
    edges = np.concatenate([[0.0], np.cumsum(p)])
    below, above = edges[:-1], edges[1:]

    def within(high: Floats, low: Floats) -> Floats:
        """P(all n draws lie in a run that starts at CDF `low` and ends at `high`)."""
        return np.clip(high[:, None] - low[None, :], 0, None) ** N_BEST

    # All in b..a, but neither all above b nor all below a.
    inside, none_at_b, none_at_a = within(above, below), within(above, above), within(below, below)
    return np.clip(inside - none_at_b - none_at_a + within(below, above), 0, None)


def population_ipo(p: Floats) -> Floats:
    """The exact minimiser of E(h_best − h_worst − target)² over log-ratios h, as a policy.

    A convex quadratic: its normal equations are a graph Laplacian's, L h = target · (row sums −
    column sums), with the constant that softmax ignores left free.
    """
    joint = joint_best_worst(p)
    np.fill_diagonal(joint, 0.0)  # a group of one outcome pulls nothing
    edges = joint + joint.T
    laplacian = np.diag(edges.sum(axis=1)) - edges
    pull = bon_target(N_BEST) * (joint.sum(axis=1) - joint.sum(axis=0))
    # Pinning the first outcome's h at 0 makes the system regular.
    h = np.concatenate([[0.0], np.linalg.solve(laplacian[1:, 1:], pull[1:])])
    tilted = p * np.exp(h - h.max())
    return tilted / tilted.sum()


def population_loss(objective: Callable[..., torch.Tensor], p: Floats) -> Loss:
    """The expected loss over best and worst of n draws from p, for a pairwise objective."""
    joint = torch.tensor(joint_best_worst(p))
    best, worst = joint.nonzero(as_tuple=True)
    weights, base = joint[best, worst], torch.tensor(np.log(p))

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        sides = (log_probs[best], log_probs[worst], base[best], base[worst])
        return weights @ objective(*sides, n=N_BEST)

    return loss


def sampled_loss(objective: Callable[..., torch.Tensor], p: Floats, groups: int) -> Loss:
    """The mean loss over drawn groups. Groups of one outcome are dropped, as in training."""
    best, worst = draw_best_and_worst(p, groups, seed=groups)
    differ = best != worst
    best, worst = torch.tensor(best[differ]), torch.tensor(worst[differ])
    base = torch.tensor(np.log(p))

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        sides = (log_probs[best], log_probs[worst], base[best], base[worst])
        return objective(*sides, n=N_BEST).mean()

    return loss


def test_joint_law() -> None:
    """The order-statistics formula against literal draws, and its margins against best-of-n."""
    p = np.array([0.3, 0.1, 0.05, 0.25, 0.2, 0.1])
    joint = joint_best_worst(p)
    assert joint.sum() == pytest.approx(1)
    np.testing.assert_allclose(joint.sum(axis=1), best_of_n_pmf(p, rewards(p), N_BEST), atol=1e-12)
    best, worst = draw_best_and_worst(p, 50_000, seed=0)
    counts = np.zeros_like(joint)
    np.add.at(counts, (best, worst), 1)
    np.testing.assert_allclose(counts / 50_000, joint, atol=0.01)


# --- SFT-BoN converges to best-of-n ---------------------------------------------------------------


def test_sft_bon_reaches_best_of_n() -> None:
    """The minimiser is the empirical law of bests, so errors fall like 1/√groups.

    At 30,000 groups: 0.03 in total variation, 0.003 in win rate, 0.01 nats in KL.
    """
    outcomes = 200
    p = np.random.default_rng(0).dirichlet(np.full(outcomes, 5.0))
    target = best_of_n_pmf(p, rewards(p), N_BEST)
    win, kl = win_and_kl(target, p)
    distances, kl_errors = [], []
    for groups in (300, 3_000, 30_000):
        best, _ = draw_best_and_worst(p, groups, seed=groups)
        chosen = torch.tensor(best)
        q = minimise(lambda log_probs, at=chosen: sft_bon(log_probs[at]).mean(), p, precision=1e-9)
        np.testing.assert_allclose(q, np.bincount(best, minlength=outcomes) / groups, atol=1e-3)
        distances.append(variation(q, target))
        kl_errors.append(abs(win_and_kl(q, p)[1] - kl))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert kl_errors[0] > 2 * kl_errors[1] > 4 * kl_errors[2]
    assert distances[2] < 0.03
    assert kl_errors[2] < 0.01
    assert win_and_kl(q, p)[0] == pytest.approx(win, abs=0.003)


# --- IPO-BoN and BoNBoN ---------------------------------------------------------------------------


def test_documented_ipo_figures() -> None:
    """With constant target and unlimited data IPO-BoN wins 0.8137 at 0.8785 nats, not 0.8889.

    1,000 outcomes instead of a continuum: both figures within 0.0005.
    """
    p = np.full(1000, 1 / 1000)
    win, kl = win_and_kl(population_ipo(p), p)
    assert win == pytest.approx(0.8137, abs=5e-4)
    assert kl == pytest.approx(0.8785, abs=5e-4)
    assert BestOfN(N_BEST).win_rate() - win > 0.07


def test_ipo_loss_at_best_of_n() -> None:
    """The true best-of-n policy is no zero of the loss: its margin varies by 8.6 nats.

    In the continuum the loss there is the margin's variance, 7² Σ_{k<8} 1/k² = 74.08. The worst's
    log-ratio is unbounded at low quantiles, so the outcomes are finer there.
    """
    p = np.diff(np.linspace(0, 1, 1001) ** 3)
    loss = population_loss(ipo_bon, p)
    at_best_of_n = float(loss(torch.tensor(np.log(best_of_n_pmf(p, rewards(p), N_BEST)))))
    assert 49 * sum(1 / k**2 for k in range(1, 8)) == pytest.approx(74.08, abs=0.01)
    assert at_best_of_n == pytest.approx(74.08, abs=0.5)
    # And the minimiser has less, or it would not be where training goes.
    assert float(loss(torch.tensor(np.log(population_ipo(p))))) < 0.9 * at_best_of_n


def test_linear_solve_is_the_minimum() -> None:
    """Descent on the objective itself finds the solution of the normal equations."""
    p = np.random.default_rng(1).dirichlet(np.full(60, 5.0))
    q = minimise(population_loss(ipo_bon, p), start=p)
    np.testing.assert_allclose(q, population_ipo(p), atol=1e-6)


@pytest.mark.parametrize("objective", [ipo_bon, bonbon])
def test_training_reaches_population_minimum(objective: Callable[..., torch.Tensor]) -> None:
    """Training on drawn groups comes as near as the number of groups allows.

    At 100,000 groups: 0.03 in total variation, 0.01 in win rate, 0.03 nats in KL.
    """
    p = np.random.default_rng(2).dirichlet(np.full(100, 5.0))
    target = minimise(population_loss(objective, p), start=p)
    distances = []
    for groups in (1_000, 10_000, 100_000):
        q = minimise(sampled_loss(objective, p, groups), start=p)
        distances.append(variation(q, target))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert distances[2] < 0.03
    (win, kl), (target_win, target_kl) = win_and_kl(q, p), win_and_kl(target, p)
    assert win == pytest.approx(target_win, abs=0.01)
    assert kl == pytest.approx(target_kl, abs=0.03)


def test_alpha_moves_from_ipo_to_sft() -> None:
    """α = 1 is SFT-BoN's minimiser, best-of-n itself; the paper's α stays near IPO-BoN's."""
    p = np.random.default_rng(3).dirichlet(np.full(60, 5.0))
    best_of_n, ipo_minimum = best_of_n_pmf(p, rewards(p), N_BEST), population_ipo(p)

    def at(alpha: float) -> Floats:
        def mixture(*pair: torch.Tensor, n: int) -> torch.Tensor:
            return bonbon(*pair, n=n, alpha=alpha)

        return minimise(population_loss(mixture, p), start=p, precision=1e-10)

    np.testing.assert_allclose(at(1.0), best_of_n, atol=1e-4)
    to_ipo = [variation(at(alpha), ipo_minimum) for alpha in (0.0, PAPER_ALPHA, 0.99)]
    assert to_ipo[0] < 1e-5
    assert to_ipo[0] < to_ipo[1] < to_ipo[2] < variation(best_of_n, ipo_minimum)
    assert to_ipo[1] < 0.02


# --- objectives of all ranks ----------------------------------------------------------------------

RankLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Tilt], torch.Tensor]


def weighted_likelihood(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, tilt: Tilt
) -> torch.Tensor:
    """`weighted_sft` with the arguments of the others."""
    return weighted_sft(logps, rewards, tilt)


def unscaled_regression(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, tilt: Tilt
) -> torch.Tensor:
    """`rank_regression` without its factor (m−1)/m."""
    return pairwise_regression(logps - ref_logps, log_density_targets(rewards, tilt))


def rank_loss(objective: RankLoss, p: Floats, outcomes: Ints, rewards: Floats, tilt: Tilt) -> Loss:
    """The mean loss over groups of `outcomes`, (groups, m); groups that only tie count too."""
    drawn, scores = torch.tensor(outcomes), torch.tensor(rewards, dtype=torch.float64)
    base = torch.tensor(np.log(p))

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        return objective(log_probs[drawn], base[drawn], scores, tilt).mean()

    return loss


def draw_groups(p: Floats, groups: int, m: int, seed: int) -> Ints:
    return np.random.default_rng(seed).choice(len(p), size=(groups, m), p=p)


def trained(objective: RankLoss, p: Floats, tilt: Tilt, groups: int, m: int = 8) -> Floats:
    """The minimiser over drawn groups; outcomes are numbered by ascending reward."""
    outcomes = draw_groups(p, groups, m, seed=groups)
    # Likelihood is flat where the tilt has next to no mass; 1e-7 there is 2e-4 in total variation.
    precision = 1e-7 if objective is weighted_likelihood else 1e-11
    return minimise(rank_loss(objective, p, outcomes, outcomes, tilt), p, precision)


CELLS = 100


def continuous(objective: RankLoss, tilt: Tilt, m: int) -> Floats:
    """The minimiser with unlimited data and continuous rewards, nearly.

    The reward is the quantile itself and the policy is constant on 100 equal cells of it, so
    nothing ties. The 8,192 groups are a Sobol sequence: an integral over the cube of m quantiles
    instead of a sample of it.
    """
    quantiles = qmc.Sobol(m, rng=1).random(2**13)
    cells = np.minimum((quantiles * CELLS).astype(np.intp), CELLS - 1)
    p = np.full(CELLS, 1 / CELLS)
    return minimise(rank_loss(objective, p, cells, quantiles, tilt), p)


@pytest.mark.parametrize("objective", [rank_regression, rank_regression_pointwise])
@pytest.mark.parametrize(
    ("tilt", "m"),
    [
        (BestOfN(2), 2),
        (BestOfN(2.5), 3),
        (BestOfN(8), 8),
        (BestOfN(4), 8),
        (BestOfN(32), 8),
        (WorstOfN(4), 4),
        (ExponentialTilt(5.0), 2),
        (ExponentialTilt(-9.0), 8),
    ],
    ids=repr,
)
def test_with_continuous_rewards_regression_wins_as_often_as_the_tilt(
    objective: RankLoss, tilt: Tilt, m: int
) -> None:
    """Win rates within 0.0005, for any m and n; the KL never above the tilt's own (+0.003)."""
    p = np.full(CELLS, 1 / CELLS)
    win, kl = win_and_kl(continuous(objective, tilt, m), p)
    assert win == pytest.approx(tilt.win_rate(), abs=5e-4)
    assert float(optimal_kl(win)) - 1e-3 <= kl <= tilt.kl() + 3e-3
    if isinstance(tilt, ExponentialTilt):  # the one family that smoothing leaves what it is
        assert kl == pytest.approx(tilt.kl(), abs=3e-3)


def test_without_the_factor_regression_overshoots() -> None:
    """A draw is part of its own group's mean: at n = m = 8, 0.900 at 1.308 nats, not 0.8889."""
    p = np.full(CELLS, 1 / CELLS)
    win, kl = win_and_kl(continuous(unscaled_regression, BestOfN(8), 8), p)
    assert (win, kl) == pytest.approx((0.900, 1.308), abs=1e-3)
    win, kl = win_and_kl(continuous(rank_regression, BestOfN(8), 8), p)
    assert win == pytest.approx(0.8889, abs=3e-4)
    assert kl == pytest.approx(1.2043, abs=2e-3)


# Errors allowed at 8,192 groups of 8 from 100 outcomes, in total variation, win rate and KL. Draws
# of one outcome tie, which leaves regression a bias; by likelihood the limit is exact. Where n is
# above m the regression goes by few draws near the top, so it is the noisiest.
@pytest.mark.parametrize(
    ("objective", "tilt", "distance", "win_within", "kl_within"),
    [
        (rank_regression, BestOfN(8), 0.04, 0.004, 0.03),
        (rank_regression, BestOfN(4), 0.02, 0.003, 0.02),
        (rank_regression, BestOfN(32), 0.18, 0.006, 0.25),
        (rank_regression, WorstOfN(4), 0.02, 0.003, 0.02),
        (rank_regression, ExponentialTilt(5.0), 0.02, 0.003, 0.02),
        (rank_regression_pointwise, BestOfN(8), 0.03, 0.006, 0.04),
        (rank_regression_pointwise, BestOfN(32), 0.08, 0.006, 0.12),
        (rank_regression_pointwise, WorstOfN(4), 0.02, 0.004, 0.02),
        (rank_regression_pointwise, ExponentialTilt(5.0), 0.02, 0.003, 0.02),
        (weighted_likelihood, BestOfN(8), 0.04, 0.003, 0.02),
        (weighted_likelihood, BestOfN(4), 0.02, 0.003, 0.02),
        (weighted_likelihood, WorstOfN(4), 0.02, 0.003, 0.02),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_training_on_all_ranks_reaches_the_tilt(
    objective: RankLoss, tilt: Tilt, distance: float, win_within: float, kl_within: float
) -> None:
    p = np.random.default_rng(0).dirichlet(np.full(100, 5.0))
    target = tilted_pmf(p, rewards(p), tilt)
    few, many = (trained(objective, p, tilt, groups) for groups in (128, 8_192))
    assert variation(few, target) > 2 * variation(many, target)
    assert variation(many, target) < distance
    (win, kl), (target_win, target_kl) = win_and_kl(many, p), win_and_kl(target, p)
    assert win == pytest.approx(target_win, abs=win_within)
    assert kl == pytest.approx(target_kl, abs=kl_within)


def every_group(outcomes: int, m: int) -> Ints:
    return np.stack(np.meshgrid(*[np.arange(outcomes)] * m, indexing="ij"), axis=-1).reshape(-1, m)


@pytest.mark.parametrize(
    "tilt", [BestOfN(1), BestOfN(2), BestOfN(4), WorstOfN(2), WorstOfN(4)], ids=repr
)
def test_weighted_likelihood_is_exact_over_all_groups(tilt: Tilt) -> None:
    """All 6⁴ groups of 4 with their probabilities, two outcomes of one reward among them.

    The minimiser is the law that the enumeration gives, to the precision of the descent.
    """
    p, scores = np.array([0.1, 0.25, 0.15, 0.2, 0.1, 0.2]), np.array([0.0, 1.0, 1.0, 2.0, 3.0, 4.0])
    groups = every_group(len(p), 4)
    likely = torch.tensor(p[groups].prod(axis=1))
    drawn, values = torch.tensor(groups), torch.tensor(scores[groups])
    q = minimise(lambda log_probs: likely @ weighted_sft(log_probs[drawn], values, tilt), p)
    np.testing.assert_allclose(q, tilted_pmf(p, scores, tilt), atol=1e-5)


def test_likelihood_weighs_tilts_without_exact_weights_consistently() -> None:
    """Best-of-32 of 8 draws is best-of-32 of those 8, 0.886; of more draws it nears the tilt."""
    p = np.random.default_rng(0).dirichlet(np.full(60, 5.0))
    for tilt in (BestOfN(32), ExponentialTilt(5.0)):
        target = tilted_pmf(p, rewards(p), tilt)
        goal, _ = win_and_kl(target, p)
        wins = []
        for m in (8, 64):
            q = trained(weighted_likelihood, p, tilt, groups=8_192 // m, m=m)
            drawn = draw_groups(p, 8_192 // m, m, seed=8_192 // m)
            weights = tie_weights(torch.tensor(drawn).double(), tilt).numpy()
            mass = np.bincount(drawn.ravel(), weights.ravel(), minlength=len(p))
            np.testing.assert_allclose(q, mass / mass.sum(), atol=1e-3)
            wins.append(win_and_kl(q, p)[0])
        assert goal - wins[0] > 3 * abs(goal - wins[1])
        assert wins[1] == pytest.approx(goal, abs=0.015)
        if tilt == BestOfN(32):
            assert wins[0] == pytest.approx(0.886, abs=0.01)
