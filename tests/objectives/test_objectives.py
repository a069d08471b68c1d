"""The objectives against arithmetic written out by hand, finite differences, and TRL.

Each objective is a pure function of summed log-probabilities, so plain Python floats are a complete
reference for values, and gradcheck for gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

from bonbon.objectives.catalogue import OBJECTIVES, GroupLogps, ObjectiveSettings, group_metrics
from bonbon.objectives.pairs import (
    PAPER_ALPHA,
    bon_beta,
    bonbon,
    bonbon_dpo,
    dpo,
    ipo,
    ipo_bon,
    sft_bon,
)
from bonbon.objectives.ranks import (
    bonbon_ranks,
    log_density_targets,
    pairwise_regression,
    rank_regression,
    rank_regression_huber,
    rank_regression_pointwise,
    tie_weights,
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
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.discrete import best_of_n_pmf
from bonbon.tilt.exponential import ExponentialTilt
from bonbon.tilt.ranks import rank_targets, rank_weights
from support.profiles import quick

Floats = NDArray[np.float64]
Logps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# best, worst, ref_best, ref_worst: sums over tokens, so far below 0.
numbers = st.floats(-300, 0)
rows = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)
sizes = st.integers(2, 64)
alphas = st.floats(0, 1)
betas = st.floats(1e-3, 2)


def columns(values: list[tuple[float, ...]]) -> Logps:
    best, worst, ref_best, ref_worst = torch.tensor(values, dtype=torch.float64).T
    return best, worst, ref_best, ref_worst


def margins(values: list[tuple[float, ...]]) -> NDArray[np.float64]:
    return np.array([(b - rb) - (w - rw) for b, w, rb, rw in values])


def harmonic_target(n: int) -> float:
    return (n - 1) * sum(1 / k for k in range(1, n))


def matches(losses: torch.Tensor, expected: NDArray[np.float64]) -> None:
    assert losses.shape == (len(expected),)
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-9)


# --- values ---------------------------------------------------------------------------------------


@quick
@given(rows)
def test_sft_bon(values: list[tuple[float, ...]]) -> None:
    matches(sft_bon(columns(values)[0]), np.array([-row[0] for row in values]))


@pytest.mark.slow
@quick
@given(rows, sizes)
def test_ipo_bon(values: list[tuple[float, ...]], n: int) -> None:
    matches(ipo_bon(*columns(values), n), (margins(values) - harmonic_target(n)) ** 2)


@pytest.mark.slow
@quick
@given(rows, sizes, alphas)
def test_bonbon_mixes(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    sft = np.array([-row[0] for row in values])
    squares = (margins(values) - harmonic_target(n)) ** 2
    matches(bonbon(*columns(values), n, alpha), alpha * sft + (1 - alpha) * squares)


@quick
@given(rows, betas)
def test_dpo(values: list[tuple[float, ...]], beta: float) -> None:
    # ln(1 + e^(−x)), as numpy's logaddexp computes it without overflow.
    matches(dpo(*columns(values), beta), np.logaddexp(0, -beta * margins(values)))


@quick
@given(rows, betas)
def test_ipo(values: list[tuple[float, ...]], beta: float) -> None:
    matches(ipo(*columns(values), beta), (margins(values) - 1 / (2 * beta)) ** 2)


@pytest.mark.slow
@quick
@given(rows, sizes, alphas)
def test_bonbon_dpo(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    sft = np.array([-row[0] for row in values])
    preference = np.logaddexp(0, -margins(values) / (2 * harmonic_target(n)))
    matches(bonbon_dpo(*columns(values), n, alpha), alpha * sft + (1 - alpha) * preference)


@pytest.mark.slow
@quick
@given(rows, sizes)
def test_ipo_bon_is_ipo_at_beta(values: list[tuple[float, ...]], n: int) -> None:
    """Two derivations of one loss: the paper's β for IPO gives BoNBoN's target."""
    logps = columns(values)
    torch.testing.assert_close(ipo_bon(*logps, n), ipo(*logps, bon_beta(n)))


def test_paper_defaults() -> None:
    """α = 0.005 is the paper's, and what bonbon takes when nobody says otherwise."""
    logps = columns([(-10.0, -20.0, -11.0, -12.0)])
    expected = 0.005 * 10 + 0.995 * (9 - 18.15) ** 2
    assert float(bonbon(*logps, n=8)) == pytest.approx(expected)
    assert ObjectiveSettings(n=8, tilt=BestOfN(8)).alpha == PAPER_ALPHA == 0.005
    assert float(bonbon_dpo(*logps, n=8)) == pytest.approx(
        0.005 * 10 + 0.995 * math.log1p(math.exp(-9 / 36.3))
    )


def test_extreme_margins_stay_finite() -> None:
    """Sequence log-ratios of hundreds of nats occur; σ underflows there, ln σ must not."""
    logps = columns([(-2000.0, 0.0, 0.0, -2000.0), (0.0, -2000.0, -2000.0, 0.0)])
    matches(dpo(*logps, beta=1.0), np.array([4000.0, 0.0]))


# --- all ranks: values ----------------------------------------------------------------------------

tilts: st.SearchStrategy[Tilt] = st.one_of(
    st.floats(1.01, 64).map(BestOfN),
    st.integers(2, 8).map(BestOfN),  # whole n up to m have weights of their own
    st.floats(1.01, 64).map(WorstOfN),
    st.integers(2, 8).map(WorstOfN),
    st.floats(-30, 30, allow_subnormal=False).map(ExponentialTilt),
)


@st.composite
def batches(draw: st.DrawFn, most: int = 6) -> GroupLogps:
    """One to three groups of one size; rewards of few values, so that many tie, or of any."""
    shape = draw(st.integers(1, 3)), draw(st.integers(2, most))
    reward = draw(st.sampled_from([st.integers(0, 3), st.floats(-100, 100, allow_subnormal=False)]))

    def matrix(values: st.SearchStrategy[Any]) -> torch.Tensor:
        row = st.lists(values, min_size=shape[1], max_size=shape[1])
        rows = draw(st.lists(row, min_size=shape[0], max_size=shape[0]))
        return torch.tensor(rows, dtype=torch.float64)

    return GroupLogps(matrix(numbers), matrix(numbers), matrix(reward))


def tied_ranks(rewards: Floats) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each completion of a group with the ranks, from 0, that it shares with those it ties with."""
    for index, reward in enumerate(rewards):
        below = int((rewards < reward).sum())
        yield index, np.arange(below, below + int((rewards == reward).sum()))


def plain_targets(rewards: torch.Tensor, tilt: Tilt) -> Floats:
    """ln of the mean density of the ranks, one completion after the other."""
    targets = rank_targets(tilt, rewards.shape[1])
    found = np.empty(tuple(rewards.shape))
    for group, row in zip(found, rewards.numpy(), strict=True):
        for index, ranks in tied_ranks(row):
            group[index] = special.logsumexp(targets[ranks]) - math.log(len(ranks))
    return found


def plain_weights(rewards: torch.Tensor, tilt: Tilt) -> Floats:
    weights = rank_weights(tilt, rewards.shape[1])
    found = np.empty(tuple(rewards.shape))
    for group, row in zip(found, rewards.numpy(), strict=True):
        for index, ranks in tied_ranks(row):
            group[index] = weights[ranks].mean()
    return found


def plain_pairs(log_ratios: Floats, targets: Floats) -> Floats:
    """The mean over all pairs of a group of ((h_i − h_j) − (t_i − t_j))²."""
    return np.array(
        [
            np.mean(
                [((h[i] - h[j]) - (t[i] - t[j])) ** 2 for i, j in combinations(range(len(h)), 2)]
            )
            for h, t in zip(log_ratios, targets, strict=True)
        ]
    )


def plain_regression(batch: GroupLogps, tilt: Tilt) -> Floats:
    m = batch.rewards.shape[1]
    log_ratios = (batch.logps - batch.ref_logps).numpy()
    return plain_pairs(log_ratios, plain_targets(batch.rewards, tilt) * (m - 1) / m)


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_log_density_targets(batch: GroupLogps, tilt: Tilt) -> None:
    got = log_density_targets(batch.rewards, tilt)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(
        got.numpy(), plain_targets(batch.rewards, tilt), rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_tie_weights(batch: GroupLogps, tilt: Tilt) -> None:
    got = tie_weights(batch.rewards, tilt)
    m = batch.rewards.shape[1]
    np.testing.assert_allclose(got.numpy(), plain_weights(batch.rewards, tilt), atol=1e-9)
    np.testing.assert_allclose(got.sum(dim=1).numpy(), m, rtol=1e-9)


@pytest.mark.slow
@quick
@given(batches())
def test_pairwise_regression(batch: GroupLogps) -> None:
    log_ratios, targets = batch.logps - batch.ref_logps, batch.rewards
    expected = plain_pairs(log_ratios.numpy(), targets.numpy())
    matches(pairwise_regression(log_ratios, targets), expected)


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_rank_regression(batch: GroupLogps, tilt: Tilt) -> None:
    matches(rank_regression(*batch.ranks(), tilt), plain_regression(batch, tilt))


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_rank_regression_pointwise(batch: GroupLogps, tilt: Tilt) -> None:
    residuals = (batch.logps - batch.ref_logps).numpy() - plain_targets(batch.rewards, tilt)
    matches(rank_regression_pointwise(*batch.ranks(), tilt), (residuals**2).mean(axis=1))


@pytest.mark.slow
@quick
@given(batches(), tilts, st.floats(0.1, 500))
def test_rank_regression_huber(batch: GroupLogps, tilt: Tilt, delta: float) -> None:
    m = batch.rewards.shape[1]
    log_ratios = (batch.logps - batch.ref_logps).numpy()
    targets = plain_targets(batch.rewards, tilt) * (m - 1) / m
    residuals = log_ratios - targets
    residuals -= residuals.mean(axis=1, keepdims=True)
    expected = 4 * special.huber(delta, residuals).sum(axis=1) / (m - 1)
    matches(rank_regression_huber(*batch.ranks(), tilt, delta), expected)


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_huber_with_a_large_delta_is_rank_regression(batch: GroupLogps, tilt: Tilt) -> None:
    torch.testing.assert_close(
        rank_regression_huber(*batch.ranks(), tilt, delta=1e9),
        rank_regression(*batch.ranks(), tilt),
    )


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_weighted_sft(batch: GroupLogps, tilt: Tilt) -> None:
    weights = plain_weights(batch.rewards, tilt)
    expected = -(weights * batch.logps.numpy()).mean(axis=1)
    matches(weighted_sft(batch.logps, batch.rewards, tilt), expected)


@pytest.mark.slow
@quick
@given(batches(), tilts, alphas)
def test_bonbon_ranks_mixes(batch: GroupLogps, tilt: Tilt, alpha: float) -> None:
    sft = -(plain_weights(batch.rewards, tilt) * batch.logps.numpy()).mean(axis=1)
    regression = plain_regression(batch, tilt)
    expected = alpha * sft + (1 - alpha) * regression
    matches(bonbon_ranks(*batch.ranks(), tilt, alpha), expected)
    by_default = bonbon_ranks(*batch.ranks(), tilt)
    matches(by_default, PAPER_ALPHA * sft + (1 - PAPER_ALPHA) * regression)


# --- all ranks: what must hold whatever the values ------------------------------------------------


@pytest.mark.slow
@quick
@given(rows, sizes)
def test_the_ranks_one_and_n_alone_are_ipo_bon(values: list[tuple[float, ...]], n: int) -> None:
    """Pairwise regression on best-of-n's own mean log-densities generalises the paper's IPO."""
    best, worst, ref_best, ref_worst = columns(values)
    log_ratios = torch.stack([best - ref_best, worst - ref_worst], dim=1)
    ends = torch.tensor(BestOfN(n).rank_log_density(n)[[-1, 0]])
    regression = pairwise_regression(log_ratios, ends.expand(log_ratios.shape))
    torch.testing.assert_close(regression, ipo_bon(*columns(values), n), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_every_pair_is_an_ipo_of_its_own(batch: GroupLogps, tilt: Tilt) -> None:
    """The mean over ordered pairs of `ipo` at 1/(2β) = the pair's target, where it is not 0."""
    m = batch.rewards.shape[1]
    targets = plain_targets(batch.rewards, tilt) * (m - 1) / m
    losses = np.zeros(len(targets))
    for i, j in combinations(range(m), 2):
        sides = batch.logps[:, i], batch.logps[:, j], batch.ref_logps[:, i], batch.ref_logps[:, j]
        for group, target in enumerate(targets[:, i] - targets[:, j]):
            beta = 1 / (2 * target) if abs(target) > 1e-9 else math.inf
            losses[group] += float(ipo(*(side[group] for side in sides), beta)) * 2 / (m * (m - 1))
    np.testing.assert_allclose(rank_regression(*batch.ranks(), tilt), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@quick
@given(batches(), st.integers(1, 6), st.booleans())
def test_weighted_sft_averages_over_subsets(batch: GroupLogps, n: int, best_wanted: bool) -> None:
    """For n ≤ m it is the mean of SFT on the best of every n-subset, ties shared evenly."""
    m = batch.rewards.shape[1]
    n = min(n, m)
    expected = []
    for logps, rewards in zip(batch.logps.numpy(), batch.rewards.numpy(), strict=True):
        losses = []
        for subset in combinations(range(m), n):
            values = rewards[list(subset)]
            winners = values == (values.max() if best_wanted else values.min())
            losses.append(-logps[list(subset)][winners].mean())
        expected.append(np.mean(losses))
    tilt = BestOfN(n) if best_wanted else WorstOfN(n)
    matches(weighted_sft(batch.logps, batch.rewards, tilt), np.array(expected))


def test_weighted_sft_of_all_draws_is_sft_bon() -> None:
    batch = RANKS
    best = batch.logps.gather(1, batch.rewards.argmax(dim=1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(weighted_sft(batch.logps, batch.rewards, BestOfN(4)), sft_bon(best))


RANK_LOSSES: dict[str, Callable[[GroupLogps, Tilt], torch.Tensor]] = {
    "rank_regression": lambda g, tilt: rank_regression(*g.ranks(), tilt),
    "rank_regression_pointwise": lambda g, tilt: rank_regression_pointwise(*g.ranks(), tilt),
    "rank_regression_huber": lambda g, tilt: rank_regression_huber(*g.ranks(), tilt, delta=3.0),
    "weighted_sft": lambda g, tilt: weighted_sft(g.logps, g.rewards, tilt),
    "bonbon_ranks": lambda g, tilt: bonbon_ranks(*g.ranks(), tilt, alpha=0.3),
}
every_rank_loss = pytest.mark.parametrize("name", RANK_LOSSES)


@pytest.mark.slow
@quick
@given(batches(), tilts, st.randoms(use_true_random=False))
def test_the_order_within_a_group_does_not_matter(
    batch: GroupLogps, tilt: Tilt, random: Any
) -> None:
    order = list(range(batch.rewards.shape[1]))
    random.shuffle(order)
    shuffled = GroupLogps(*(column[:, order] for column in batch.ranks()))
    for given_, permuted in (
        (log_density_targets(batch.rewards, tilt), log_density_targets(shuffled.rewards, tilt)),
        (tie_weights(batch.rewards, tilt), tie_weights(shuffled.rewards, tilt)),
    ):
        torch.testing.assert_close(given_[:, order], permuted, rtol=1e-12, atol=1e-12)
    for loss in RANK_LOSSES.values():
        torch.testing.assert_close(loss(batch, tilt), loss(shuffled, tilt))


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_groups_do_not_see_each_other(batch: GroupLogps, tilt: Tilt) -> None:
    assert len(batch.rewards) > 0
    for loss in RANK_LOSSES.values():
        alone = [
            loss(GroupLogps(*(column[[g]] for column in batch.ranks())), tilt)
            for g in range(len(batch.rewards))
        ]
        torch.testing.assert_close(loss(batch, tilt), torch.cat(alone))


@pytest.mark.slow
@quick
@given(batches(), tilts, st.floats(-100, 100))
def test_a_constant_on_a_group_s_log_ratios_cancels(
    batch: GroupLogps, tilt: Tilt, constant: float
) -> None:
    """Centred losses compare within a group only; the pointwise one also holds the level."""
    moved = replace(batch, logps=batch.logps + constant)
    for name in ("rank_regression", "rank_regression_huber"):
        loss = RANK_LOSSES[name]
        torch.testing.assert_close(loss(moved, tilt), loss(batch, tilt), rtol=1e-7, atol=1e-6)
    both = replace(moved, ref_logps=batch.ref_logps + constant)
    pointwise = RANK_LOSSES["rank_regression_pointwise"]
    torch.testing.assert_close(pointwise(both, tilt), pointwise(batch, tilt), rtol=1e-7, atol=1e-6)
    if abs(constant) > 1:
        assert not torch.allclose(pointwise(moved, tilt), pointwise(batch, tilt), rtol=1e-6)


@pytest.mark.slow
@quick
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8), tilts)
def test_only_the_order_of_the_rewards_counts(rewards: list[int], tilt: Tilt) -> None:
    plain = torch.tensor([rewards], dtype=torch.float64)
    for monotone in (plain**3, 2.0**plain, 1e-9 * plain + 5):
        for of in (log_density_targets, tie_weights):
            torch.testing.assert_close(of(monotone, tilt), of(plain, tilt), rtol=0, atol=0)


@pytest.mark.slow
@quick
@given(st.permutations(range(6)), tilts)
def test_better_rewards_have_higher_targets(order: list[int], tilt: Tilt) -> None:
    """Or lower ones, for tilts that prefer low rewards."""
    targets = log_density_targets(torch.tensor([order], dtype=torch.float64), tilt)[0]
    rises = targets[torch.tensor(order).argsort()].diff()
    sign = 1 if tilt.win_rate() >= 0.5 else -1
    assert torch.all(sign * rises >= -1e-9)  # a tilt of 1e-200 leaves nothing but rounding


def test_rewards_that_differ_in_the_last_digit_do_not_tie() -> None:
    rewards = torch.tensor([[1.0, math.nextafter(1.0, 2), 0.0]], dtype=torch.float64)
    targets = log_density_targets(rewards, BestOfN(4))[0]
    np.testing.assert_allclose(targets[[2, 0, 1]], rank_targets(BestOfN(4), 3))
    assert tie_weights(rewards, BestOfN(3))[0].tolist() == [0.0, 3.0, 0.0]
    # In float32 they are one number.
    targets = log_density_targets(rewards.float(), BestOfN(4))[0]
    assert targets[0] == targets[1]


def test_a_zero_has_no_sign() -> None:
    rewards = torch.tensor([[0.0, -0.0, 1.0]], dtype=torch.float64)
    targets = log_density_targets(rewards, BestOfN(3))[0]
    assert targets[0] == targets[1] < targets[2]


@every_rank_loss
@pytest.mark.parametrize("tilt", [BestOfN(1000), WorstOfN(1000), ExponentialTilt(1000)], ids=repr)
def test_extreme_tilts_stay_finite(name: str, tilt: Tilt) -> None:
    """Best-of-1000 from 8 draws: targets of thousands of nats, whose densities underflow."""
    rewards = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 1, 1, 2, 2]]).double()
    logps = torch.linspace(-90, -20, 16, dtype=torch.float64).view(2, 8).requires_grad_()
    loss = RANK_LOSSES[name](GroupLogps(logps, torch.full_like(logps, -50), rewards), tilt)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert float(log_density_targets(rewards, tilt).diff(dim=1).abs().max()) > 100


def test_all_tied_groups_pull_nothing_apart() -> None:
    """The trainer drops them; here they must at least not be NaN."""
    batch = GroupLogps(RANKS.logps, RANKS.logps, torch.zeros_like(RANKS.rewards))
    torch.testing.assert_close(rank_regression(*batch.ranks(), BestOfN(4)), torch.zeros(2).double())
    weights = tie_weights(batch.rewards, BestOfN(4))
    torch.testing.assert_close(weights, torch.ones(2, 4).double())


def test_binary_rewards() -> None:
    """The figures of `log_density_targets`' docstring: n = m = 8, rewards 0 or 1, each at one half.

    Averaged over the pairs of mixed groups, which is what `rank_regression` does, the log of the
    mean density puts 6.1 nats between the two values; the mean target would put far more. Best-of-8
    itself puts ln 255 = 5.54 there, and with the factor (m−1)/m the minimiser puts 5.36.
    """
    m = 8
    base, tilted = np.array([0.5, 0.5]), best_of_n_pmf([0.5, 0.5], [0, 1], m)
    truth = np.diff(np.log(tilted / base)).item()
    assert truth == pytest.approx(5.54, abs=0.005)
    targets, pairs, by_density, by_target = rank_targets(BestOfN(m), m), [], [], []
    for good in range(1, m):
        rewards = torch.tensor([[0.0] * (m - good) + [1.0] * good], dtype=torch.float64)
        found = log_density_targets(rewards, BestOfN(m))[0]
        by_density.append(float(found[-1] - found[0]))
        by_target.append(targets[m - good :].mean() - targets[: m - good].mean())
        pairs.append(math.comb(m, good) * good * (m - good))
    apart = np.average(by_density, weights=pairs)
    assert apart == pytest.approx(6.13, abs=0.005)
    assert np.average(by_target, weights=pairs) > 8.5
    assert apart * (m - 1) / m == pytest.approx(5.36, abs=0.005)


# --- gradients ------------------------------------------------------------------------------------

OTHER_PAIRS = ("best_random", "random_pair")
EVERY_LOSS: dict[str, Callable[..., torch.Tensor]] = {
    "ipo_bon": lambda *logps: ipo_bon(*logps, n=8),
    "bonbon": lambda *logps: bonbon(*logps, n=4, alpha=0.3),
    "dpo": lambda *logps: dpo(*logps, beta=0.2),
    "ipo": lambda *logps: ipo(*logps, beta=0.1),
    "bonbon_dpo": lambda *logps: bonbon_dpo(*logps, n=4, alpha=0.3),
    "sft_bon": lambda best, *_: sft_bon(best),
}
EVERY_LOSS |= {
    f"{loss}_{pair}": EVERY_LOSS[loss] for loss in ("dpo", "ipo") for pair in OTHER_PAIRS
}


@pytest.mark.parametrize("name", ["ipo_bon", "bonbon", "dpo", "ipo", "bonbon_dpo", "sft_bon"])
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(4)]
    inputs = tuple(logp.requires_grad_() for logp in logps)
    used = inputs[:1] if name == "sft_bon" else inputs
    assert torch.autograd.gradcheck(EVERY_LOSS[name], used)


@pytest.mark.slow
@every_rank_loss
@pytest.mark.parametrize(
    "tilt", [BestOfN(3), BestOfN(9.5), WorstOfN(2), ExponentialTilt(4)], ids=repr
)
def test_gradcheck_of_all_ranks(name: str, tilt: Tilt) -> None:
    """In the policy's and the base model's log-probabilities, with ties among the rewards."""
    generator = torch.Generator().manual_seed(0)
    inputs = [-20 * torch.rand(2, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    rewards = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 1, 2, 0]], dtype=torch.float64)

    def loss(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return RANK_LOSSES[name](GroupLogps(logps, ref_logps, rewards), tilt)

    used = tuple(values.requires_grad_() for values in inputs)
    if name == "weighted_sft":  # does not look at the base model
        assert torch.autograd.gradcheck(lambda logps: loss(logps, used[1]), used[:1])
    else:
        assert torch.autograd.gradcheck(loss, used)


@pytest.mark.slow
@quick
@given(batches(), tilts)
def test_rank_regression_gradient(batch: GroupLogps, tilt: Tilt) -> None:
    """∂/∂ln π(y_i) = 4/(m−1)·(h_i − h̄ − (t_i − t̄)), so a group's sum to 0."""
    m = batch.rewards.shape[1]
    logps = batch.logps.clone().requires_grad_()
    rank_regression(logps, batch.ref_logps, batch.rewards, tilt).sum().backward()
    residuals = (batch.logps - batch.ref_logps).numpy()
    residuals = residuals - plain_targets(batch.rewards, tilt) * (m - 1) / m
    residuals -= residuals.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logps.grad, 4 * residuals / (m - 1), rtol=1e-9, atol=1e-8)


@pytest.mark.slow
@quick
@given(rows, sizes, alphas)
def test_bonbon_gradient(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    """∂/∂ln π(y_b) = −α + 2(1−α)(margin − target); the worst gets the second term's negative."""
    best, worst, ref_best, ref_worst = columns(values)
    best.requires_grad_()
    worst.requires_grad_()
    bonbon(best, worst, ref_best, ref_worst, n, alpha).sum().backward()
    pull = 2 * (1 - alpha) * (margins(values) - harmonic_target(n))
    np.testing.assert_allclose(best.grad, -alpha + pull, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(worst.grad, -pull, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@quick
@given(rows, betas)
def test_dpo_gradient(values: list[tuple[float, ...]], beta: float) -> None:
    best, worst, ref_best, ref_worst = columns(values)
    best.requires_grad_()
    dpo(best, worst, ref_best, ref_worst, beta).sum().backward()
    expected = -beta / (1 + np.exp(np.clip(beta * margins(values), -700, 700)))
    np.testing.assert_allclose(best.grad, expected, rtol=1e-9, atol=1e-12)


# --- routing --------------------------------------------------------------------------------------

PAIR = columns([(-10.0, -14.0, -12.0, -11.0), (-3.0, -2.0, -4.0, -6.0)])
PAIRS_OF_GROUPS = GroupLogps(
    logps=torch.stack(PAIR[:2], dim=1),
    ref_logps=torch.stack(PAIR[2:], dim=1),
    rewards=torch.tensor([[1.0, 0.0], [3.0, -2.0]], dtype=torch.float64),
)
RANKS = GroupLogps(
    logps=torch.tensor([[-10.0, -14.0, -9.0, -3.0], [-3.0, -2.0, -7.0, -5.5]]).double(),
    ref_logps=torch.tensor([[-12.0, -11.0, -9.5, -6.0], [-4.0, -6.0, -5.0, -5.0]]).double(),
    rewards=torch.tensor([[0.5, 2.0, -1.0, 0.25], [1.0, 3.0, -2.0, 0.0]]).double(),
)
TILT = BestOfN(3)
SETTINGS = ObjectiveSettings(n=4, tilt=TILT, alpha=0.2, beta=0.3, delta=1.5)
SELECTORS: dict[str, Selector] = {
    "bonbon": best_and_worst,
    "sft_bon": best,
    "ipo_bon": best_and_worst,
    "bonbon_dpo": best_and_worst,
    "bonbon_ranks": all_completions,
    "rank_regression": all_completions,
    "rank_regression_pointwise": all_completions,
    "rank_regression_huber": all_completions,
    "weighted_sft": all_completions,
    "dpo": best_and_worst,
    "dpo_best_random": best_and_random,
    "dpo_random_pair": random_pair,
    "ipo": best_and_worst,
    "ipo_best_random": best_and_random,
    "ipo_random_pair": random_pair,
}


def chosen(name: str) -> GroupLogps:
    """Groups as the objective gets them."""
    return RANKS if SELECTORS[name] is all_completions else PAIRS_OF_GROUPS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bonbon", bonbon(*PAIR, n=4, alpha=0.2)),
        ("sft_bon", sft_bon(PAIR[0])),
        ("ipo_bon", ipo_bon(*PAIR, n=4)),
        ("bonbon_dpo", bonbon_dpo(*PAIR, n=4, alpha=0.2)),
        ("bonbon_ranks", bonbon_ranks(*RANKS.ranks(), TILT, alpha=0.2)),
        ("rank_regression", rank_regression(*RANKS.ranks(), TILT)),
        ("rank_regression_pointwise", rank_regression_pointwise(*RANKS.ranks(), TILT)),
        ("rank_regression_huber", rank_regression_huber(*RANKS.ranks(), TILT, delta=1.5)),
        ("weighted_sft", weighted_sft(RANKS.logps, RANKS.rewards, TILT)),
        *((f"dpo{of}", dpo(*PAIR, beta=0.3)) for of in ("", "_best_random", "_random_pair")),
        *((f"ipo{of}", ipo(*PAIR, beta=0.3)) for of in ("", "_best_random", "_random_pair")),
    ],
)
def test_routes(name: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(OBJECTIVES[name].loss(chosen(name), SETTINGS), expected)


def test_every_objective_is_routed() -> None:
    assert set(OBJECTIVES) == set(EVERY_LOSS) | set(RANK_LOSSES)
    assert {name: objective.select for name, objective in OBJECTIVES.items()} == SELECTORS
    assert {name for name, it in OBJECTIVES.items() if it.any_tilt} == set(RANK_LOSSES)
    by_likelihood = {name for name, it in OBJECTIVES.items() if not it.compares}
    assert by_likelihood == {"sft_bon", "weighted_sft"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_compares_uses_the_base_model(name: str) -> None:
    """`compares` decides what may be trained on draws of a cut distribution."""
    group = chosen(name)
    other = replace(
        group, ref_logps=group.ref_logps * torch.tensor([1.5, 0.5] * 2)[: group.logps.shape[1]]
    )
    loss = OBJECTIVES[name].loss
    same = torch.equal(loss(group, SETTINGS), loss(other, SETTINGS))
    assert same != OBJECTIVES[name].compares


@pytest.mark.parametrize(
    ("setting", "value", "changed"),
    [
        ("n", 5, {"bonbon", "ipo_bon", "bonbon_dpo"}),
        ("tilt", WorstOfN(2), set(RANK_LOSSES)),
        ("alpha", 0.7, {"bonbon", "bonbon_dpo", "bonbon_ranks"}),
        (
            "beta",
            0.9,
            {name for name in SELECTORS if name.startswith(("dpo", "ipo"))} - {"ipo_bon"},
        ),
        ("delta", 0.5, {"rank_regression_huber"}),
    ],
)
def test_setting_changes_only_its_objectives(setting: str, value: Any, changed: set[str]) -> None:
    """A setting that leaks into, or is lost on the way to, an objective is a silent wrong run."""
    other = replace(SETTINGS, **{setting: value})
    differing = {
        name
        for name, objective in OBJECTIVES.items()
        if not torch.equal(
            objective.loss(chosen(name), SETTINGS), objective.loss(chosen(name), other)
        )
    }
    assert differing == changed


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_no_pair_is_refused(name: str, width: int) -> None:
    """Objectives of pairs take two completions; SFT-BoN only ever looks at the first."""
    group = GroupLogps(*(column[:, :width] for column in RANKS.ranks()))
    if SELECTORS[name] in (best_and_worst, best_and_random, random_pair):
        with pytest.raises(ValueError, match=f"needs two completions, got {width}"):
            OBJECTIVES[name].loss(group, SETTINGS)
    elif name == "sft_bon":
        torch.testing.assert_close(OBJECTIVES[name].loss(group, SETTINGS), -group.logps[:, 0])


def test_no_mode_flags() -> None:
    """One objective a function: none of them takes a boolean or a string that picks another."""
    pairs = (sft_bon, ipo_bon, bonbon, dpo, ipo, bonbon_dpo)
    ranks = (rank_regression, rank_regression_pointwise, rank_regression_huber, weighted_sft)
    for loss in (*pairs, *ranks, bonbon_ranks, pairwise_regression):
        kinds = {str(p.annotation) for p in inspect.signature(loss).parameters.values()}
        assert kinds <= {"torch.Tensor", "int", "float", "Tilt"}


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.slow
@quick
@given(rows)
def test_group_metrics_of_pairs(values: list[tuple[float, ...]]) -> None:
    best, worst, ref_best, ref_worst = columns(values)
    rewards = torch.tensor([[1.0, 0.0]] * len(values), dtype=torch.float64)
    group = GroupLogps(
        torch.stack([best, worst], dim=1), torch.stack([ref_best, ref_worst], dim=1), rewards
    )
    got = group_metrics(group)
    matches(got["sft_loss"], np.array([-row[0] for row in values]))
    matches(got["best_log_ratio"], np.array([row[0] - row[2] for row in values]))
    matches(got["margin"], margins(values))
    higher = [row[0] - row[2] > row[1] - row[3] for row in values]
    np.testing.assert_array_equal(got["accuracy"], np.array(higher, dtype=float))


@pytest.mark.slow
@quick
@given(batches())
def test_group_metrics(batch: GroupLogps) -> None:
    got = group_metrics(batch)
    assert len(batch.rewards) > 0
    for g, (logps, refs, rewards) in enumerate(
        zip(*(column.numpy() for column in batch.ranks()), strict=True)
    ):
        h, top, low = logps - refs, int(np.argmax(rewards)), int(np.argmin(rewards))
        assert float(got["sft_loss"][g]) == pytest.approx(-logps[top])
        assert float(got["best_log_ratio"][g]) == pytest.approx(h[top])
        assert float(got["margin"][g]) == pytest.approx(h[top] - h[low])
        pairs = [(i, j) for i in range(len(h)) for j in range(len(h)) if rewards[i] > rewards[j]]
        if pairs:
            ordered = np.mean([h[i] > h[j] for i, j in pairs])
            assert float(got["accuracy"][g]) == pytest.approx(ordered)


def test_group_metrics_of_best_alone() -> None:
    alone = GroupLogps(*(column[:, :1] for column in RANKS.ranks()))
    assert set(group_metrics(alone)) == {"sft_loss", "best_log_ratio"}


# --- TRL ------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
PAIRS = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h"},
    {"prompt": "h", "chosen": " a b", "rejected": " c d e a a"},
    {"prompt": "d d", "chosen": " g", "rejected": " b h h"},
]


def tiny_llama(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.6,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def word_tokenizer() -> Any:
    """Words split at spaces, so that a prompt's tokens never merge with its completion's."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(WORDS[:3])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


class TrlRun:
    """One batch through TRL's own DPOTrainer, and the same token ids through our code."""

    BETA = 0.25

    def __init__(self, loss_type: str, folder: Path):
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        arguments = trl.DPOConfig(
            output_dir=str(folder), loss_type=loss_type, beta=self.BETA, use_cpu=True, bf16=False,
            per_device_train_batch_size=len(PAIRS), report_to=[], save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        policy, base = tiny_llama(1), tiny_llama(2)
        trainer = trl.DPOTrainer(
            model=policy, ref_model=base, args=arguments, processing_class=word_tokenizer(),
            train_dataset=datasets.Dataset.from_list(PAIRS),
        )  # fmt: skip
        self.rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
        batch = trainer.data_collator(self.rows)
        policy.eval()
        self.loss = float(trainer.compute_loss(trainer.model, batch).detach())
        self.logps = [
            self.sums(model, column)
            for model in (policy, base)
            for column in ("chosen_ids", "rejected_ids")
        ]

    def lengths(self, column: str) -> torch.Tensor:
        return torch.tensor([len(row[column]) for row in self.rows])

    def sums(self, model: Any, column: str) -> torch.Tensor:
        from bonbon.models.logprobs import completion_log_probs  # loads transformers
        from bonbon.models.padding import pad_rows

        padded = pad_rows([r["prompt_ids"] for r in self.rows], [r[column] for r in self.rows], 0)
        with torch.no_grad():
            return completion_log_probs(model, padded)


@pytest.mark.slow
def test_trl_dpo_agrees(tmp_path: Path) -> None:
    """TRL's sigmoid loss is a mean of ours over pairs: same ids, summed log-probabilities."""
    run = TrlRun("sigmoid", tmp_path)
    assert run.lengths("chosen_ids").tolist() == [5, 3, 2]  # TRL adds the end token
    assert run.loss == pytest.approx(float(dpo(*run.logps, beta=run.BETA).mean()), rel=1e-5)


def test_trl_ipo_divides_by_length(tmp_path: Path) -> None:
    """Why TRL's β does not carry over: its `ipo` is ours on means over tokens, not on sums."""
    run = TrlRun("ipo", tmp_path)
    lengths = [run.lengths("chosen_ids"), run.lengths("rejected_ids")] * 2
    averaged = [logp / length for logp, length in zip(run.logps, lengths, strict=True)]
    assert run.loss == pytest.approx(float(ipo(*averaged, beta=run.BETA).mean()), rel=1e-5)
    assert run.loss != pytest.approx(float(ipo(*run.logps, beta=run.BETA).mean()), rel=0.1)


def test_trl_sft_is_a_token_mean(tmp_path: Path) -> None:
    """Why TRL's α does not carry over: its `sft` weighs a pair by its share of the tokens."""
    run = TrlRun("sft", tmp_path)
    total, tokens = float(run.logps[0].sum()), int(run.lengths("chosen_ids").sum())
    assert run.loss == pytest.approx(-total / tokens, rel=1e-5)
    assert run.loss != pytest.approx(float(sft_bon(run.logps[0]).mean()), rel=0.1)
