"""Closed forms of the tilts against quadrature, simulation and published values.

Every figure that the toolkit reports rests on these formulas, so each is checked against at least
one way of getting the number that shares no algebra with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.integrate import fixed_quad

from bonbon.errors import BonbonError
from bonbon.frontier import frontier_rows, parse_ns
from bonbon.objectives import bon_beta, bon_target
from bonbon.tilt import (
    BestOfN,
    ExponentialTilt,
    Identity,
    Tilt,
    WorstOfN,
    optimal_kl,
    optimal_win_rate,
)

Floats = NDArray[np.float64]

# The same examples on every run and no deadline: a busy machine must not turn a test red.
quick = settings(deadline=None, max_examples=60, derandomize=True)

# 1e-300 and 1e-12 lose all digits in the textbook forms, 0.05 is where the series takes over,
# 1e6 overflows e^β.
BETAS = [1e-300, 1e-12, 1e-3, 0.0499, 0.0501, 1.0, 10.0, 30.0, 1e3, 1e6]

TILTS: list[Tilt] = [
    Identity(),
    *(BestOfN(n) for n in (1, 1.0001, 2, 2.5, 8, 64, 1000)),
    *(WorstOfN(n) for n in (1, 2.5, 8, 64, 1000)),
    ExponentialTilt(0.0),
    *(ExponentialTilt(sign * beta) for beta in BETAS for sign in (1, -1)),
]

every_tilt = pytest.mark.parametrize("tilt", TILTS, ids=repr)

ns = st.floats(1, 1000)
tilts: st.SearchStrategy[Tilt] = st.one_of(
    st.just(Identity()),
    ns.map(BestOfN),
    ns.map(WorstOfN),
    st.floats(-1e4, 1e4, allow_subnormal=False).map(ExponentialTilt),
)


def integral(g: Callable[[Floats], Floats], low: float = 0.0, high: float = 1.0) -> float:
    """∫ g by Gauss–Legendre on panels that halve towards 0 and 1, where tilts have their mass."""
    powers = 2.0 ** -np.arange(1, 46)
    edges = np.unique(np.concatenate([[0.0, 1.0], powers, 1 - powers]))
    edges = np.unique(np.concatenate([[low], edges[(edges > low) & (edges < high)], [high]]))
    return math.fsum(fixed_quad(g, a, b, n=24)[0] for a, b in pairwise(edges))


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
    [BestOfN(8), WorstOfN(4), ExponentialTilt(5.0), ExponentialTilt(-2.0), Identity()],
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


@quick
@given(st.data())
def test_rank_log_ratio_by_quadrature(data: st.DataObject) -> None:
    """U_(i) of m uniforms has density Beta(i, m + 1 − i)."""
    m = data.draw(st.integers(1, 20), label="m")
    i, j = (data.draw(st.integers(1, m), label=name) for name in "ij")
    strategies = [st.floats(1, 50).map(kind) for kind in (BestOfN, WorstOfN)]
    tilt: Tilt = data.draw(st.one_of(*strategies, st.floats(-50, 50).map(ExponentialTilt)))

    def expected_log(rank: int) -> float:
        law = stats.beta(rank, m + 1 - rank)
        return integral(lambda u: law.pdf(u) * tilt.log_density(u))

    got = float(tilt.rank_log_ratio(i, j, m))
    assert got == pytest.approx(expected_log(i) - expected_log(j), abs=1e-7)


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


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BestOfN, WorstOfN])
@pytest.mark.parametrize("n", [0, 0.999, -2, math.inf, math.nan])
def test_bad_n(kind: Callable[[float], Tilt], n: float) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        kind(n)


@pytest.mark.parametrize("beta", [math.inf, -math.inf, math.nan])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="finite beta"):
        ExponentialTilt(beta)


@pytest.mark.parametrize(
    "tilt", [Identity(), BestOfN(3), WorstOfN(3), ExponentialTilt(2), ExponentialTilt(-2)], ids=repr
)
@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, math.nan, [0.5, 2.0]])
def test_arguments_outside_unit(tilt: Tilt, value: ArrayLike) -> None:
    for method in (tilt.log_density, tilt.cdf, tilt.quantile):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            method(value)


@pytest.mark.parametrize(
    "tilt", [Identity(), BestOfN(3), WorstOfN(3), ExponentialTilt(2)], ids=repr
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
