"""Discrete outcomes against exact enumeration: every tuple of draws, every subset, every pair."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bonbon.tilt.base import Identity, Tilt
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.discrete import (
    best_of_n_bounds,
    best_of_n_kl_estimate,
    best_of_n_pmf,
    kl_pmf,
    tilted_pmf,
    win_rate_pmf,
)
from bonbon.tilt.exponential import ExponentialTilt
from bonbon.tilt.ranks import best_of_n_rank_weights
from support.profiles import quick

thorough = settings(quick, max_examples=80)

Floats = NDArray[np.float64]


@st.composite
def pmfs(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """A small law and its rewards: few reward values, so ties abound, and zeros among p."""
    size = draw(st.integers(1, 5))
    weights = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size).filter(any))
    rewards = draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size))
    return np.array(weights) / sum(weights), np.array(rewards, dtype=np.float64)


def enumerated_best_of_n(p: Floats, r: Floats, n: int) -> Floats:
    """The law of the best of n draws, ties broken at random among the tied draws."""
    law = np.zeros(len(p))
    for draws in itertools.product(range(len(p)), repeat=n):
        probability = math.prod(p[y] for y in draws)
        winners = [y for y in draws if r[y] == max(r[z] for z in draws)]
        for y in winners:
            law[y] += probability / len(winners)
    return law


# --- the law of best-of-n -------------------------------------------------------------------------


@pytest.mark.slow
@thorough
@given(pmfs(), st.integers(1, 4))
def test_pmf_by_enumeration(law: tuple[Floats, Floats], n: int) -> None:
    """Sharing a level's mass by p is what a random choice among the tied draws comes to."""
    p, r = law
    got = best_of_n_pmf(p, r, n)
    np.testing.assert_allclose(got, enumerated_best_of_n(p, r, n), atol=1e-12)
    np.testing.assert_array_equal(got[p == 0], 0)


@pytest.mark.slow
@thorough
@given(pmfs(), st.integers(1, 64))
def test_pmf_in_bond_form(law: tuple[Floats, Floats], n: int) -> None:
    """Sessa et al.: π(y) = π0(y) F^(n−1) Σ_{i=1..n} (F⁻/F)^(i−1)."""
    p, r = law
    at = np.array([p[r <= value].sum() for value in r])
    below = np.array([p[r < value].sum() for value in r])
    share = np.divide(below, at, out=np.zeros_like(at), where=at > 0)
    bond = p * at ** (n - 1) * sum(share**i for i in range(n))
    np.testing.assert_allclose(best_of_n_pmf(p, r, n), bond, atol=1e-12)


@pytest.mark.slow
@thorough
@given(pmfs(), st.integers(1, 4))
def test_worst_is_best_of_negated(law: tuple[Floats, Floats], n: int) -> None:
    p, r = law
    worst = tilted_pmf(p, r, WorstOfN(n))
    np.testing.assert_allclose(worst, enumerated_best_of_n(p, -r, n), atol=1e-12)


@pytest.mark.slow
@thorough
@given(pmfs())
def test_identity_keeps_p(law: tuple[Floats, Floats]) -> None:
    np.testing.assert_allclose(tilted_pmf(*law, Identity()), law[0], atol=1e-12)


@pytest.mark.slow
@thorough
@given(pmfs(), st.floats(-30, 30))
def test_pmf_depends_on_order_only(law: tuple[Floats, Floats], beta: float) -> None:
    """A tilt acts on quantiles: any increasing map of the rewards leaves the policy as it is."""
    p, r = law
    tilt = ExponentialTilt(beta)
    tilted = tilted_pmf(p, r, tilt)
    np.testing.assert_allclose(tilted, tilted_pmf(p, np.exp(3 * r) + 7, tilt), atol=1e-12)
    assert tilted.sum() == pytest.approx(1)


@pytest.mark.parametrize("tilt", [BestOfN(8), ExponentialTilt(6.0), WorstOfN(3)], ids=repr)
def test_many_outcomes_approach_closed_form(tilt: Tilt) -> None:
    """20,000 outcomes of random probability come within their spacing of the continuous limit."""
    rng = np.random.default_rng(0)
    p, r = rng.dirichlet(np.ones(20_000)), rng.normal(size=20_000)
    q = tilted_pmf(p, r, tilt)
    assert win_rate_pmf(q, p, r) == pytest.approx(tilt.win_rate(), abs=1e-5)
    assert kl_pmf(q, p) == pytest.approx(tilt.kl(), abs=2e-4)


def test_all_tied_changes_nothing() -> None:
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(best_of_n_pmf(p, np.zeros(3), 8), p)


# --- win rate and KL ------------------------------------------------------------------------------


@pytest.mark.slow
@thorough
@given(pmfs(), st.data())
def test_win_rate_by_enumeration(law: tuple[Floats, Floats], data: st.DataObject) -> None:
    p, r = law
    sizes = {"min_size": len(p), "max_size": len(p)}
    weights = data.draw(st.lists(st.integers(0, 6), **sizes).filter(any), label="q")
    q = np.array(weights) / sum(weights)
    pairs = itertools.product(range(len(p)), repeat=2)
    expected = sum(q[a] * p[b] * ((r[a] > r[b]) + 0.5 * (r[a] == r[b])) for a, b in pairs)
    assert win_rate_pmf(q, p, r) == pytest.approx(expected, abs=1e-12)
    if np.any((q > 0) & (p == 0)):
        assert kl_pmf(q, p) == math.inf
    else:
        terms = [a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0]
        assert kl_pmf(q, p) == pytest.approx(sum(terms), abs=1e-12)


@pytest.mark.slow
@thorough
@given(pmfs(), st.integers(1, 64))
def test_continuous_values_are_bounds(law: tuple[Floats, Floats], n: int) -> None:
    p, r = law
    q = best_of_n_pmf(p, r, n)
    win, kl = best_of_n_bounds(n)
    assert (win, kl) == pytest.approx((n / (n + 1), math.log(n) - (n - 1) / n))
    assert 0.5 - 1e-12 <= win_rate_pmf(q, p, r) <= win + 1e-12
    assert -1e-12 <= kl_pmf(q, p) <= kl + 1e-12


# --- Beirami et al.'s estimate --------------------------------------------------------------------


def test_estimate_example() -> None:
    """Ten outcomes, n = 4: the estimate lies between the exact KL and the bound."""
    p = np.array([0.0479, 0.0718, 0.0014, 0.0002, 0.0387, 0.1147, 0.0474, 0.0532, 0.1983, 0.4264])
    q = best_of_n_pmf(p, np.arange(10.0), 4)
    assert kl_pmf(q, p) == pytest.approx(0.5401, abs=5e-5)
    assert q @ best_of_n_kl_estimate(np.log(p), 4) == pytest.approx(0.5551, abs=5e-5)
    assert best_of_n_bounds(4)[1] == pytest.approx(0.6363, abs=5e-5)


@thorough
@given(st.floats(-700, 0), st.integers(1, 256))
def test_estimate_formula(log_eps: float, n: int) -> None:
    """The formula as printed, where it can be evaluated as printed, and the bound everywhere."""
    got = float(best_of_n_kl_estimate(log_eps, n))
    bound = best_of_n_bounds(n)[1]
    assert got <= bound + 1e-12
    eps = math.exp(log_eps)
    if 1e-6 < eps < 1 - 1e-6:
        none = (1 - eps) ** n
        log_other = math.log(n) + (n - 1) * math.log(1 - eps) - (n - 1) / n
        expected = none * log_other + (1 - none) * math.log((1 - none) / eps)
        assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_estimate_limits(n: int) -> None:
    """A sure outcome costs nothing; a completion never met twice costs the bound."""
    got = best_of_n_kl_estimate([0.0, -60.0, -1000.0, -math.inf], n)
    np.testing.assert_allclose(got[0], 0, atol=1e-12)
    np.testing.assert_allclose(got[1:], best_of_n_bounds(n)[1], atol=1e-12)


# --- rank weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(m, n) for m in range(1, 9) for n in range(1, m + 1)])
def test_rank_weights_by_enumeration(m: int, n: int) -> None:
    bests = [max(subset) for subset in itertools.combinations(range(m), n)]
    expected = np.bincount(bests, minlength=m) / len(bests)
    np.testing.assert_allclose(best_of_n_rank_weights(m, n), expected, atol=1e-12)


@pytest.mark.slow
def test_rank_weights_of_many() -> None:
    """Thousands of draws: C(m, n) is far beyond float64, the weights must still sum to 1."""
    weights = best_of_n_rank_weights(5000, 700)
    assert weights.sum() == pytest.approx(1)
    assert weights[-1] == pytest.approx(700 / 5000)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "r", "message"),
    [
        ([0.5, 0.4], [0, 1], "sum to 1"),
        ([1.5, -0.5], [0, 1], "non-negative"),
        ([math.nan, 1.0], [0, 1], "sum to 1"),
        ([0.5, 0.5], [0, 1, 2], "one length"),
        ([[0.5, 0.5]], [[0, 1]], "vectors"),
        ([0.5, 0.5], [0, math.inf], "finite"),
        ([0.5, 0.5], [0, math.nan], "finite"),
    ],
)
def test_bad_pmf(p: list[float], r: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_n_pmf(p, r, 2)


@pytest.mark.parametrize(("m", "n"), [(4, 5), (4, 0), (0, 0)])
def test_bad_rank_weights(m: int, n: int) -> None:
    with pytest.raises(ValueError, match="1 <= n <= m"):
        best_of_n_rank_weights(m, n)


@pytest.mark.parametrize(("logprobs", "n"), [([0.1], 4), ([math.nan], 4), ([-1.0], 0)])
def test_bad_estimate(logprobs: list[float], n: int) -> None:
    with pytest.raises(ValueError, match=r"log-probabilities|n >= 1"):
        best_of_n_kl_estimate(logprobs, n)
