"""Closed forms of the tilts against quadrature, simulation and published values.

Every figure that the toolkit reports rests on these formulas, so each is checked against at least
one way of getting the number that shares no algebra with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bonbon.objectives.pairs import bon_beta, bon_target
from bonbon.system.errors import BonbonError
from bonbon.tilt import TILTS as NAMED_TILTS
from bonbon.tilt import ExponentialTilt, optimal_kl, optimal_win_rate
from bonbon.tilt.base import Identity, Tilt
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.best_of_poisson import BestOfPoisson
from bonbon.tilt.frontier import frontier_rows, parse_ns
from bonbon.tilt.ranks import rank_targets, rank_weights
from support.profiles import quick

Floats = NDArray[np.float64]

# The same examples on every run and no deadline: a busy machine must not turn a test red.

# 1e-300 and 1e-12 lose all digits in the textbook forms, 0.05 is where the series takes over,
# 1e6 overflows e^β.
BETAS = [1e-300, 1e-12, 1e-3, 0.0499, 0.0501, 1.0, 10.0, 30.0, 1e3, 1e6]

TILTS: list[Tilt] = [
    Identity(),
    *(BestOfN(n) for n in (1, 1.0001, 2, 2.5, 8, 64, 1000)),
    *(WorstOfN(n) for n in (1, 2.5, 8, 64, 1000)),
    ExponentialTilt(0.0),
    *(ExponentialTilt(sign * beta) for beta in BETAS for sign in (1, -1)),
    *(BestOfPoisson(mu) for mu in (0.0, *BETAS)),
]

every_tilt = pytest.mark.parametrize("tilt", TILTS, ids=repr)

ns = st.floats(1, 1000)
tilts: st.SearchStrategy[Tilt] = st.one_of(
    st.just(Identity()),
    ns.map(BestOfN),
    ns.map(WorstOfN),
    st.floats(-1e4, 1e4, allow_subnormal=False).map(ExponentialTilt),
    st.floats(0, 1e4).map(BestOfPoisson),
)


NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(24)


def panels(low: float = 0.0, high: float = 1.0) -> tuple[Floats, Floats]:
    """Gauss–Legendre points and weights on panels that halve towards 0 and 1.

    The tilts have their mass at the ends.
    """
    powers = 2.0 ** -np.arange(1, 46)
    edges = np.unique(np.concatenate([[0.0, 1.0], powers, 1 - powers]))
    edges = np.unique(np.concatenate([[low], edges[(edges > low) & (edges < high)], [high]]))
    widths = np.diff(edges)[:, None]
    return (edges[:-1, None] + widths * (NODES + 1) / 2).ravel(), (
        widths * NODE_WEIGHTS / 2
    ).ravel()


def integral(g: Callable[[Floats], Floats], low: float = 0.0, high: float = 1.0) -> float:
    """∫ g."""
    points, weights = panels(low, high)
    return float(np.sum(weights * g(points)))


def density(tilt: Tilt, u: ArrayLike) -> Floats:
    return np.exp(tilt.log_density(u))


# --- published values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "win", "kl", "optimal_win"),
    [
        (2, 0.6667, 0.1931, 0.6759),
        (4, 0.8000, 0.6363, 0.8040),
        (8, 0.8889, 1.2044, 0.8897),
        (32, 0.9697, 2.4970, 0.9697),
    ],
)
def test_published_win_rates(n: int, win: float, kl: float, optimal_win: float) -> None:
    (row,) = frontier_rows([n])
    assert row["win_rate"] == pytest.approx(win, abs=5e-5)
    assert row["kl"] == pytest.approx(kl, abs=5e-5)
    assert row["optimal_win_rate_at_kl"] == pytest.approx(optimal_win, abs=5e-5)
    # The least KL for best-of-n's win rate lies below best-of-n's own, and gives that rate back.
    assert row["least_kl_for_win_rate"] < row["kl"]
    assert optimal_win_rate(row["least_kl_for_win_rate"]) == pytest.approx(row["win_rate"])


@pytest.mark.parametrize(("n", "target"), [(2, 1.0), (4, 5.5), (8, 18.15)])
def test_published_ipo_targets(n: int, target: float) -> None:
    assert bon_target(n) == pytest.approx(target, abs=1e-9)
    assert frontier_rows([n])[0]["ipo_target"] == pytest.approx(target, abs=1e-9)


def test_published_beta() -> None:
    assert bon_beta(8) == pytest.approx(0.0275482094, abs=5e-11)


@pytest.mark.parametrize("n", range(2, 40))
def test_target_is_harmonic(n: int) -> None:
    """The paper writes the target as a sum; the code gets it from the digamma function."""
    assert bon_target(n) == pytest.approx((n - 1) * sum(1 / k for k in range(1, n)), rel=1e-12)


def test_parse_ns() -> None:
    assert parse_ns("2, 4,2.5") == [2, 4, 2.5]
    assert isinstance(parse_ns("8")[0], int)


@pytest.mark.parametrize("text", ["", "x", "0", "2,,4", "inf", "nan", "-3"])
def test_parse_ns_rejects(text: str) -> None:
    with pytest.raises(BonbonError, match="not a number >= 1"):
        parse_ns(text)


# --- each tilt against quadrature -----------------------------------------------------------------


@every_tilt
def test_is_tilt(tilt: Tilt) -> None:
    assert isinstance(tilt, Tilt)


@every_tilt
def test_density_integrates_to_one(tilt: Tilt) -> None:
    assert integral(lambda u: density(tilt, u)) == pytest.approx(1, abs=1e-9)


@every_tilt
def test_win_rate_by_quadrature(tilt: Tilt) -> None:
    assert tilt.win_rate() == pytest.approx(integral(lambda u: u * density(tilt, u)), abs=1e-9)


@every_tilt
def test_kl_by_quadrature(tilt: Tilt) -> None:
    expected = integral(lambda u: density(tilt, u) * tilt.log_density(u))
    assert tilt.kl() == pytest.approx(expected, abs=1e-8)
    assert tilt.kl() >= 0


@every_tilt
def test_cdf_by_quadrature(tilt: Tilt) -> None:
    points = np.array([0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0])
    expected = [integral(lambda u: density(tilt, u), 0.0, x) if x else 0.0 for x in points]
    np.testing.assert_allclose(tilt.cdf(points), expected, atol=1e-9)


@every_tilt
def test_quantile_inverts_cdf(tilt: Tilt) -> None:
    p = np.array([0.0, 1e-6, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-6, 1.0])
    u = tilt.quantile(p)
    assert np.all((u >= 0) & (u <= 1))
    assert np.all(np.diff(u) >= 0)
    np.testing.assert_allclose(tilt.cdf(u), p, atol=1e-8)


@quick
@given(tilts, st.floats(0, 1))
def test_quantile_inverts_cdf_property(tilt: Tilt, p: float) -> None:
    assert float(tilt.cdf(tilt.quantile(p))) == pytest.approx(p, abs=1e-8)


@quick
@given(tilts, st.floats(0, 1), st.floats(0, 1))
def test_cdf_increases(tilt: Tilt, a: float, b: float) -> None:
    low, high = sorted([a, b])
    assert 0 <= float(tilt.cdf(low)) <= float(tilt.cdf(high)) + 1e-15 <= 1 + 2e-15
    assert float(tilt.cdf(0.0)) == pytest.approx(0, abs=1e-12)
    assert float(tilt.cdf(1.0)) == pytest.approx(1, abs=1e-12)


# --- each tilt against simulation -----------------------------------------------------------------

moderate = pytest.mark.parametrize(
    "tilt",
    [
        BestOfN(8),
        WorstOfN(4),
        ExponentialTilt(5.0),
        ExponentialTilt(-2.0),
        BestOfPoisson(7.0),
        Identity(),
    ],
    ids=repr,
)


@moderate
def test_draws_by_quantile(tilt: Tilt) -> None:
    """quantile(uniform) draws from the tilt: its mean is the win rate, its mean ln f the KL."""
    draws = tilt.quantile(np.random.default_rng(0).random(200_000))
    assert draws.mean() == pytest.approx(tilt.win_rate(), abs=0.003)  # > 4 standard errors
    assert tilt.log_density(draws).mean() == pytest.approx(tilt.kl(), abs=0.015)
    assert stats.kstest(draws[:20_000], tilt.cdf).pvalue > 1e-4


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_literal_best_and_worst(n: int) -> None:
    """The tilts are the laws of the largest and smallest of n uniforms, drawn literally."""
    draws = np.random.default_rng(n).random((20_000, n))
    assert stats.kstest(draws.max(axis=1), BestOfN(n).cdf).pvalue > 1e-4
    assert stats.kstest(draws.min(axis=1), WorstOfN(n).cdf).pvalue > 1e-4
    opponents = np.random.default_rng(n + 100).random(20_000)
    won = (draws.max(axis=1) > opponents).mean()
    assert won == pytest.approx(BestOfN(n).win_rate(), abs=0.015)


# --- ranks ----------------------------------------------------------------------------------------


@moderate
def test_rank_log_ratio_by_simulation(tilt: Tilt) -> None:
    m = 6
    logs = tilt.log_density(np.sort(np.random.default_rng(1).random((100_000, m)), axis=1))
    means, errors = logs.mean(axis=0), logs.std(axis=0) / math.sqrt(len(logs))
    i, j = np.meshgrid(np.arange(1, m + 1), np.arange(1, m + 1))
    got = tilt.rank_log_ratio(i, j, m)
    assert got.shape == (m, m)
    tolerance = 5 * (errors[i - 1] + errors[j - 1]) + 1e-12
    assert np.all(np.abs(got - (means[i - 1] - means[j - 1])) <= tolerance)


@moderate
def test_rank_log_density_by_simulation(tilt: Tilt) -> None:
    m = 6
    logs = tilt.log_density(np.sort(np.random.default_rng(2).random((100_000, m)), axis=1))
    errors = logs.std(axis=0) / math.sqrt(len(logs))
    got = tilt.rank_log_density(m)
    assert got.shape == (m,)
    assert np.all(np.abs(got - logs.mean(axis=0)) <= 5 * errors + 1e-12)


# Ranks tell of tilts that are not too steep for the draws to have seen.
gentle: st.SearchStrategy[Tilt] = st.one_of(
    st.just(Identity()),
    st.floats(1, 50).map(BestOfN),
    st.floats(1, 50).map(WorstOfN),
    st.floats(-50, 50, allow_subnormal=False).map(ExponentialTilt),
    st.floats(0, 50).map(BestOfPoisson),
)


@pytest.mark.slow
@quick
@given(gentle, st.integers(1, 20))
def test_rank_log_density_by_quadrature(tilt: Tilt, m: int) -> None:
    """U_(i) of m uniforms has density Beta(i, m + 1 − i)."""
    u, weights = panels()
    i = np.arange(1, m + 1)
    laws = stats.beta.pdf(u, i[:, None], m + 1 - i[:, None])
    expected = (laws * tilt.log_density(u)) @ weights
    got = tilt.rank_log_density(m)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-7)
    ratios = tilt.rank_log_ratio(i[:, None], i[None, :], m)
    np.testing.assert_allclose(ratios, got[:, None] - got[None, :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_rank_log_density_of_linear_log_densities(m: int) -> None:
    """The base model has ln f = 0 everywhere; the exponential tilt's is linear, E[U_(i)] known."""
    np.testing.assert_array_equal(Identity().rank_log_density(m), np.zeros(m))
    i = np.arange(1, m + 1)
    expected = 3 * i / (m + 1) - math.log(math.expm1(3) / 3)
    np.testing.assert_allclose(ExponentialTilt(3.0).rank_log_density(m), expected, rtol=1e-12)


# --- what regression on ranks ends at -------------------------------------------------------------


def rank_laws(u: Floats, m: int) -> Floats:
    """P(rank i among m | quantile u), shape (m, points): m − 1 others, i − 1 of them below."""
    return np.asarray(stats.binom.pmf(np.arange(m)[:, None], m - 1, u))


def regressed(targets: ArrayLike) -> tuple[float, float, float]:
    """Mass, win rate and KL of the density exp(Σ_i t_i P(rank i | u)).

    A regression of log-densities on `targets` by rank converges to it: its value at u is the mean
    target there.
    """
    u, weights = panels()
    log_density = np.asarray(targets) @ rank_laws(u, len(np.asarray(targets)))
    mass = weights * np.exp(log_density)
    return float(mass.sum()), float(mass @ u), float(mass @ log_density)


def stretch(tilt: Tilt, m: int) -> float:
    """By how much the targets are further apart than the tilt's own mean log-densities."""
    targets, plain = rank_targets(tilt, m), tilt.rank_log_density(m)
    return float((targets[-1] - targets[0]) / (plain[-1] - plain[0]))


steep: st.SearchStrategy[Tilt] = st.one_of(
    st.floats(1, 1000).map(BestOfN),
    st.floats(1, 1000).map(WorstOfN),
    st.floats(-200, 200, allow_subnormal=False).map(ExponentialTilt),
    st.floats(0, 200).map(BestOfPoisson),
    st.just(Identity()),
)
sizes = st.integers(2, 16)


@pytest.mark.slow
@quick
@given(steep, sizes)
def test_rank_targets_have_the_tilt_s_win_rate(tilt: Tilt, m: int) -> None:
    mass, win, kl = regressed(rank_targets(tilt, m))
    assert mass == pytest.approx(1, abs=1e-8)
    assert win == pytest.approx(tilt.win_rate(), abs=1e-8)
    # Smoothing flattens: no more than the tilt spends, and as ever not less than the frontier.
    # Best-of-Poisson is so near to it that another form at the same win rate may cost 3e-6 more.
    assert float(optimal_kl(min(max(win, 0.0), 1.0))) - 1e-6 <= kl <= tilt.kl() + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("n", [1.3, 2, 4, 8, 64])
@pytest.mark.parametrize("m", [2, 3, 4, 8, 16])
def test_rank_targets_of_best_and_worst_mirror(n: float, m: int) -> None:
    best, worst = rank_targets(BestOfN(n), m), rank_targets(WorstOfN(n), m)
    assert np.all(np.diff(best) > 0)
    np.testing.assert_allclose(worst, best[::-1], rtol=1e-9, atol=1e-9)
    assert regressed(worst)[1] == pytest.approx(1 / (n + 1), abs=1e-8)


@pytest.mark.parametrize(
    ("n", "c", "within"), [(2, 2.15, 5e-3), (4, 1.10, 5e-3), (8, 1.0007, 5e-5)]
)
def test_documented_stretches(n: int, c: float, within: float) -> None:
    assert stretch(BestOfN(n), n) == pytest.approx(c, abs=within)


@pytest.mark.parametrize(
    ("n", "win", "kl"), [(2, 0.582, 0.041), (4, 0.787, 0.565), (8, 0.8888, 1.2037)]
)
def test_documented_figures_without_the_stretch(n: int, win: float, kl: float) -> None:
    """Regression on the tilt's own mean log-densities falls short of best-of-n's n/(n+1)."""
    plain = BestOfN(n).rank_log_density(n)
    mass, _, _ = regressed(plain)
    normalised = regressed(plain - math.log(mass))
    decimals = 5e-4 if n < 8 else 5e-5
    assert normalised[1:] == pytest.approx((win, kl), abs=decimals)
    assert normalised[1] < BestOfN(n).win_rate()


@pytest.mark.slow
@quick
@given(st.floats(0.01, 200), st.sampled_from([1, -1]), sizes)
def test_rank_targets_of_the_exponential_tilt_are_exact(size: float, sign: int, m: int) -> None:
    """ln f is linear and so survives the smoothing: stretched by (m+1)/(m−1) it is the tilt."""
    tilt = ExponentialTilt(sign * size)
    assert stretch(tilt, m) == pytest.approx((m + 1) / (m - 1), rel=1e-8)
    u = np.linspace(0, 1, 33)
    smoothed = rank_targets(tilt, m) @ rank_laws(u, m)
    np.testing.assert_allclose(smoothed, tilt.log_density(u), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_rank_targets_of_the_base_model_are_zero() -> None:
    np.testing.assert_allclose(rank_targets(Identity(), 5), np.zeros(5), atol=1e-12)
    np.testing.assert_allclose(rank_targets(BestOfN(1), 5), np.zeros(5), atol=1e-12)


def test_rank_targets_by_simulation() -> None:
    """The population claim on literal draws: mean target at a quantile is the smoothed density."""
    m, targets = 4, rank_targets(BestOfN(4), 4)
    others = np.random.default_rng(0).random((200_000, m - 1))
    for u in (0.1, 0.5, 0.95):
        seen = targets[(others < u).sum(axis=1)]
        expected = float((targets @ rank_laws(np.array([u]), m))[0])
        assert seen.mean() == pytest.approx(expected, abs=5 * seen.std() / math.sqrt(len(seen)))


@pytest.mark.slow
def test_rank_targets_are_kept_and_cannot_be_changed() -> None:
    targets = rank_targets(BestOfN(3), 6)
    assert rank_targets(BestOfN(3), 6) is targets
    with pytest.raises(ValueError, match="read-only"):
        targets[0] = 1


@pytest.mark.parametrize("m", [1, 0, -1])
def test_rank_targets_need_two_draws(m: int) -> None:
    with pytest.raises(ValueError, match="m >= 2 draws"):
        rank_targets(BestOfN(2), m)


# --- weights of ranks -----------------------------------------------------------------------------


@quick
@given(tilts, st.integers(1, 64))
def test_rank_weights_sum_to_m(tilt: Tilt, m: int) -> None:
    weights = rank_weights(tilt, m)
    assert weights.shape == (m,)
    assert np.all(weights >= 0)
    assert weights.sum() == pytest.approx(m)


@pytest.mark.parametrize("m", range(1, 8))
def test_rank_weights_count_subsets(m: int) -> None:
    """m times the share of the n-subsets whose best (or worst) is the draw of that rank."""
    for n in range(1, m + 1):
        subsets = list(combinations(range(m), n))
        for kind, pick in ((BestOfN, max), (WorstOfN, min)):
            chosen = np.bincount([pick(subset) for subset in subsets], minlength=m)
            np.testing.assert_allclose(rank_weights(kind(n), m), m * chosen / len(subsets))


@pytest.mark.parametrize("m", [1, 2, 8])
def test_rank_weights_of_all_draws(m: int) -> None:
    np.testing.assert_array_equal(rank_weights(BestOfN(m), m), m * np.eye(m)[-1])
    np.testing.assert_array_equal(rank_weights(WorstOfN(m), m), m * np.eye(m)[0])
    np.testing.assert_allclose(rank_weights(Identity(), m), np.ones(m))


@quick
@given(st.data())
def test_rank_weights_are_unbiased(data: st.DataObject) -> None:
    """Exactly: the mean weight of a draw with quantile u is the tilt's density there."""
    m = data.draw(st.integers(1, 24), label="m")
    kind = data.draw(st.sampled_from([BestOfN, WorstOfN]), label="kind")
    tilt = kind(data.draw(st.integers(1, m), label="n"))
    u = np.linspace(0, 1, 33)
    np.testing.assert_allclose(
        rank_weights(tilt, m) @ rank_laws(u, m), density(tilt, u), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("tilt", [BestOfN(3), WorstOfN(5), BestOfN(8)], ids=repr)
def test_weighted_means_by_simulation(tilt: BestOfN | WorstOfN) -> None:
    """Weighted means over m draws agree with literal best-of-n, for functions of any shape."""
    m, groups = 8, 100_000
    ranked = np.sort(np.random.default_rng(3).random((groups, m)), axis=1)
    fresh = np.random.default_rng(4).random((groups, int(tilt.n)))
    literal = fresh.max(axis=1) if isinstance(tilt, BestOfN) else fresh.min(axis=1)
    for f in (np.square, lambda u: np.cos(9 * u), lambda u: (u > 0.9).astype(float)):
        means = (rank_weights(tilt, m) * f(ranked)).mean(axis=1)
        direct = f(literal)
        error = math.sqrt((means.var() + direct.var()) / groups)
        assert means.mean() == pytest.approx(direct.mean(), abs=5 * error)
        assert means.var() <= direct.var() * 1.02  # Rao–Blackwell


@pytest.mark.parametrize("n", [4, 5])
def test_rank_weights_of_more_than_were_drawn(n: int) -> None:
    """The best of n draws, with replacement, from the m that there are."""
    m = 3
    samples = list(product(range(m), repeat=n))
    best = np.bincount([max(sample) for sample in samples], minlength=m)
    worst = np.bincount([min(sample) for sample in samples], minlength=m)
    np.testing.assert_allclose(rank_weights(BestOfN(n), m), m * best / len(samples))
    np.testing.assert_allclose(rank_weights(WorstOfN(n), m), m * worst / len(samples))


@pytest.mark.parametrize(
    "tilt",
    [
        BestOfN(32),
        BestOfN(2.5),
        WorstOfN(32),
        ExponentialTilt(5),
        ExponentialTilt(-9),
        BestOfPoisson(7),
    ],
    ids=repr,
)
def test_rank_weights_are_consistent(tilt: Tilt) -> None:
    """For tilts without exact weights the error falls with the number of draws, like 1/m."""
    errors = []
    for m in (8, 64, 512):  # 32 <= m has exact weights, which do no worse
        win = rank_weights(tilt, m) @ (np.arange(1, m + 1) / (m + 1)) / m  # E[U_(i)] = i/(m+1)
        errors.append(abs(win - tilt.win_rate()))
    assert errors[0] > 4 * errors[1]
    assert errors[1] > 4 * errors[2] or errors[1] < 1e-12
    assert errors[2] < 0.002


# --- the tilts that can be named ------------------------------------------------------------------


@pytest.mark.parametrize("n", [1.5, 2, 8, 64])
def test_named_tilts(n: float) -> None:
    best, optimal, worst = (NAMED_TILTS[name](n) for name in ("best_of_n", "optimal", "worst_of_n"))
    assert set(NAMED_TILTS) == {"best_of_n", "optimal", "worst_of_n"}
    assert (best, worst) == (BestOfN(n), WorstOfN(n))
    assert optimal.win_rate() == pytest.approx(n / (n + 1), rel=1e-12)
    assert optimal.kl() == pytest.approx(float(optimal_kl(n / (n + 1))))
    assert optimal.kl() < best.kl() == worst.kl()


@quick
@given(st.floats(1e-9, 1 - 1e-9))
def test_with_win_rate_round_trip(win: float) -> None:
    tilt = ExponentialTilt.with_win_rate(win)
    assert tilt.win_rate() == pytest.approx(win, rel=1e-6, abs=1e-13)
    assert tilt.kl() == pytest.approx(float(optimal_kl(win)), rel=1e-6, abs=1e-12)
    assert (tilt.beta > 0) == (win > 0.5)


@quick
@given(st.floats(-300, 300))
def test_with_win_rate_finds_beta(beta: float) -> None:
    found = ExponentialTilt.with_win_rate(ExponentialTilt(beta).win_rate()).beta
    assert found == pytest.approx(beta, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("win", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_with_win_rate_outside(win: float) -> None:
    with pytest.raises(ValueError, match="win_rate must lie"):
        ExponentialTilt.with_win_rate(win)


# --- the frontier ---------------------------------------------------------------------------------


@quick
@given(st.floats(0, 600))
def test_frontier_inverse_from_kl(kl: float) -> None:
    """Only where the win rate still differs from 1 in float64."""
    win = float(optimal_win_rate(kl))
    assert 0.5 <= win <= 1
    if kl <= 12:
        assert float(optimal_kl(win)) == pytest.approx(kl, rel=1e-6, abs=1e-9)


@quick
@given(st.floats(0, 1))
def test_frontier_inverse_from_win_rate(win: float) -> None:
    kl = float(optimal_kl(win))
    assert kl == pytest.approx(float(optimal_kl(1 - win)), rel=1e-6, abs=1e-12)
    if math.isfinite(kl):
        assert float(optimal_win_rate(kl)) == pytest.approx(max(win, 1 - win), abs=1e-9)


def test_frontier_ends() -> None:
    np.testing.assert_array_equal(optimal_kl([0.0, 0.5, 1.0]), [math.inf, 0.0, math.inf])
    assert float(optimal_win_rate(0.0)) == 0.5
    assert optimal_win_rate([[0.1, 1.0]]).shape == (1, 2)


@quick
@given(tilts)
def test_no_tilt_beats_frontier(tilt: Tilt) -> None:
    gain = max(tilt.win_rate(), 1 - tilt.win_rate())
    assert gain <= float(optimal_win_rate(tilt.kl())) + 1e-9
    assert tilt.kl() >= float(optimal_kl(min(gain, 1.0))) * (1 - 1e-6) - 1e-9


@pytest.mark.slow
@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda ws: sum(ws) > 1e-3))
def test_no_histogram_beats_frontier(weights: list[float]) -> None:
    """Any step density, not only ours: mass w_k on the k-th of K equal bins."""
    mass = np.array(weights) / np.sum(weights)
    win = float(mass @ (np.arange(len(mass)) + 0.5)) / len(mass)
    kl = float(np.sum(mass[mass > 0] * np.log(len(mass) * mass[mass > 0])))
    assert win <= float(optimal_win_rate(max(kl, 0.0))) + 1e-9


@quick
@given(st.floats(-200, 200))
def test_exponential_is_the_frontier(beta: float) -> None:
    tilt = ExponentialTilt(beta)
    best = max(tilt.win_rate(), 1 - tilt.win_rate())
    assert float(optimal_win_rate(tilt.kl())) == pytest.approx(best, abs=1e-9)


# --- the exponential tilt near 0 and far away -----------------------------------------------------


@quick
@given(st.floats(0.045, 0.055))
def test_series_meets_closed_form(beta: float) -> None:
    """Both sides of the switch at |β| = 0.05 agree with the textbook formulas."""
    tilt = ExponentialTilt(beta)
    win = 1 / (1 - math.exp(-beta)) - 1 / beta
    assert tilt.win_rate() == pytest.approx(win, abs=1e-13)
    assert tilt.kl() == pytest.approx(beta * win - math.log(math.expm1(beta) / beta), abs=1e-14)


@quick
@given(st.floats(0, 1e4))
def test_negative_beta_mirrors(beta: float) -> None:
    up, down = ExponentialTilt(beta), ExponentialTilt(-beta)
    u = np.linspace(0, 1, 9)
    assert up.kl() == down.kl()
    assert up.win_rate() + down.win_rate() == pytest.approx(1)
    np.testing.assert_allclose(up.log_density(u), down.log_density(1 - u), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(up.cdf(u), 1 - down.cdf(1 - u), atol=1e-12)


def test_win_rate_and_kl_increase_with_beta() -> None:
    betas = np.geomspace(1e-3, 1e6, 600)
    for values in ([ExponentialTilt(b).win_rate() for b in betas],
                   [ExponentialTilt(b).kl() for b in betas]):  # fmt: skip
        assert np.all(np.diff(values) > 0)


def test_huge_beta_stays_finite() -> None:
    """ln β − 1 nats in the limit, where e^β is far beyond float64."""
    tilt = ExponentialTilt(1e300)
    assert tilt.win_rate() == 1
    assert tilt.kl() == pytest.approx(math.log(1e300) - 1)
    assert not np.any(np.isnan(tilt.cdf([0, 0.5, 1])) | np.isnan(tilt.quantile([0, 0.5, 1])))


def test_support_ends() -> None:
    """Best-of-n never returns the very worst; best-of-1 is the base model, without 0·(−∞)."""
    assert float(BestOfN(2).log_density(0.0)) == -math.inf
    assert float(WorstOfN(2).log_density(1.0)) == -math.inf
    assert float(BestOfN(1).log_density(0.0)) == 0


# --- best-of-Poisson ------------------------------------------------------------------------------


@quick
@given(st.floats(0, 200), st.floats(0, 1))
def test_best_of_poisson_is_a_mixture(mu: float, u: float) -> None:
    """Of best-of-n, n = 1 + Poisson(μ): in its CDF, its density and its win rate."""
    k = np.arange(600)
    mixing = stats.poisson.pmf(k, mu)
    tilt = BestOfPoisson(mu)
    assert float(tilt.cdf(u)) == pytest.approx(float(mixing @ u ** (k + 1.0)), rel=1e-9, abs=1e-15)
    expected = float(mixing @ ((k + 1) * u**k))
    assert float(density(tilt, u)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert tilt.win_rate() == pytest.approx(float(mixing @ ((k + 1) / (k + 2))), rel=1e-12)


@pytest.mark.parametrize("mu", [0.5, 4.0])
def test_literal_best_of_poisson(mu: float) -> None:
    rng = np.random.default_rng(11)
    best = [rng.random(1 + count).max() for count in rng.poisson(mu, 20_000)]
    assert stats.kstest(best, BestOfPoisson(mu).cdf).pvalue > 1e-4


def test_best_of_poisson_nearly_has_the_largest_win_rate() -> None:
    """Khalaf et al.: close to the frontier, and closer than best-of-n with as many draws."""
    for mu in np.geomspace(1e-3, 1e4, 60):
        tilt = BestOfPoisson(float(mu))
        assert 0 <= float(optimal_win_rate(tilt.kl())) - tilt.win_rate() < 2e-4
    poisson, best = BestOfPoisson(3.0), BestOfN(4)
    assert float(optimal_win_rate(best.kl())) - best.win_rate() > 10 * (
        float(optimal_win_rate(poisson.kl())) - poisson.win_rate()
    )


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.03, 0.0499, 0.0501, 0.2])
def test_best_of_poisson_keeps_its_digits_for_few_draws(mu: float) -> None:
    """Relative to the KL of about μ²/6, by E_f[ln f] − ln E_f = ∫ (f ln f − f + 1) ≥ 0."""
    tilt = BestOfPoisson(mu)

    def gain(u: Floats) -> Floats:
        log = tilt.log_density(u)  # f ln f − f + 1 = Σ (k−1)/k! · (ln f)^k
        return np.asarray(sum((k - 1) / math.factorial(k) * log**k for k in range(2, 14)))

    assert tilt.kl() == pytest.approx(integral(gain), rel=1e-9)
    assert tilt.kl() == pytest.approx(mu**2 / 6, rel=mu)
    win = 0.5 + mu / 6 - mu**2 / 24 + mu**3 / 120 - mu**4 / 720 + mu**5 / 5040 - mu**6 / 40320
    assert tilt.win_rate() == pytest.approx(win, rel=1e-10)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BestOfN, WorstOfN])
@pytest.mark.parametrize("n", [0, 0.999, -2, math.inf, math.nan])
def test_bad_n(kind: Callable[[float], Tilt], n: float) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        kind(n)


@pytest.mark.parametrize("mu", [-1e-9, math.inf, math.nan])
def test_bad_mu(mu: float) -> None:
    with pytest.raises(ValueError, match="finite mu >= 0"):
        BestOfPoisson(mu)


@pytest.mark.parametrize("beta", [math.inf, -math.inf, math.nan])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="finite beta"):
        ExponentialTilt(beta)


@pytest.mark.parametrize(
    "tilt",
    [
        Identity(),
        BestOfN(3),
        WorstOfN(3),
        ExponentialTilt(2),
        ExponentialTilt(-2),
        BestOfPoisson(2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, math.nan, [0.5, 2.0]])
def test_arguments_outside_unit(tilt: Tilt, value: ArrayLike) -> None:
    for method in (tilt.log_density, tilt.cdf, tilt.quantile):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            method(value)


@pytest.mark.parametrize(
    "tilt", [Identity(), BestOfN(3), WorstOfN(3), ExponentialTilt(2), BestOfPoisson(2)], ids=repr
)
@pytest.mark.parametrize(("i", "j"), [(0, 1), (1, 0), (5, 1), (1, 5), ([1, 5], 1), (math.nan, 1)])
def test_ranks_outside(tilt: Tilt, i: ArrayLike, j: ArrayLike) -> None:
    with pytest.raises(ValueError, match="ranks"):
        tilt.rank_log_ratio(i, j, 4)


@pytest.mark.parametrize("kl", [-1e-9, math.inf, math.nan, [0.1, -1.0]])
def test_bad_kl(kl: ArrayLike) -> None:
    with pytest.raises(ValueError, match="kl must be"):
        optimal_win_rate(kl)


@pytest.mark.parametrize("win", [-1e-9, 1.1, math.nan])
def test_bad_win_rate(win: float) -> None:
    with pytest.raises(ValueError, match="win_rate"):
        optimal_kl(win)


@pytest.mark.parametrize("n", [1, 0, -1])
def test_target_needs_two(n: int) -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        bon_target(n)


@pytest.mark.slow
def test_tilts_too_sharp_for_targets_are_refused() -> None:
    """Rather than integrated wrongly: at n = 60,000 the nodes would miss the peak."""
    assert rank_targets(BestOfN(10_000), 8)[-1] == pytest.approx(math.log(10_000), abs=1e-3)
    with pytest.raises(ValueError, match="too sharp"):
        rank_targets(BestOfN(60_000), 8)
