"""Best-of-k against enumerated subsets, closed forms, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bonbon.evaluation import (
    best_of_k_curve,
    best_of_k_means,
    best_of_k_weights,
    best_of_n_win_rate,
)
from bonbon.evaluation.best_of_k import expected_normal_maximum
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.discrete import best_of_n_pmf, win_rate_pmf
from support.enumeration import enumerated_best_of_n
from support.profiles import quick

# Few values, so that ties are common.
few = st.integers(-1, 2).map(float)


@pytest.mark.slow
@quick
@given(st.lists(st.tuples(few, few), min_size=2, max_size=7), st.data())
def test_best_of_n_win_rate_by_enumeration(
    rewards: list[tuple[float, float]], data: st.DataObject
) -> None:
    """With one reward for both, and with a judge that does not know what the chooser likes."""
    n = data.draw(st.integers(1, len(rewards) - 1), label="n")
    chooser, judge = (list(column) for column in zip(*rewards, strict=True))
    for decider in (chooser, judge):
        expected = enumerated_best_of_n(chooser, decider, n)
        assert best_of_n_win_rate(chooser, decider, n) == pytest.approx(expected)


@pytest.mark.slow
@quick
@given(st.data())
def test_best_of_n_win_rate_is_unbiased(data: st.DataObject) -> None:
    """Its expectation over all draws of m from a small law is the exact win rate of that law."""
    weights = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3), label="p")
    p = np.array(weights) / sum(weights)
    r = np.array(data.draw(st.lists(few, min_size=len(p), max_size=len(p)), label="r"))
    m = data.draw(st.integers(2, 4), label="m")
    n = data.draw(st.integers(1, m - 1), label="n")
    mean = sum(
        math.prod(p[y] for y in draws) * best_of_n_win_rate(r[list(draws)], r[list(draws)], n)
        for draws in itertools.product(range(len(p)), repeat=m)
    )
    assert mean == pytest.approx(win_rate_pmf(best_of_n_pmf(p, r, n), p, r))


@pytest.mark.parametrize("n", [0, 4, 5])
def test_best_of_n_needs_a_further_draw(n: int) -> None:
    with pytest.raises(ValueError, match="further draw"):
        best_of_n_win_rate([1, 2, 3, 4], [1, 2, 3, 4], n)


# --- expected values ------------------------------------------------------------------------------


@quick
@given(st.lists(st.tuples(few, few), min_size=1, max_size=6))
def test_means_by_enumeration(rows: list[tuple[float, float]]) -> None:
    chooser, values = (list(column) for column in zip(*rows, strict=True))
    got = best_of_k_means(chooser, values)
    assert best_of_k_weights(chooser).sum(axis=1) == pytest.approx(np.ones(len(rows)))
    for k in range(1, len(rows) + 1):
        found = []
        for subset in itertools.combinations(range(len(rows)), k):
            top = max(chooser[i] for i in subset)
            found.append(np.mean([values[i] for i in subset if chooser[i] == top]))
        assert got[k - 1] == pytest.approx(np.mean(found))


@pytest.mark.slow
@quick
@given(st.data())
def test_means_are_unbiased(data: st.DataObject) -> None:
    """Over all draws of m from a small law their mean is the exact mean under best-of-k."""
    weights = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3), label="p")
    p = np.array(weights) / sum(weights)
    r = np.array(data.draw(st.lists(few, min_size=len(p), max_size=len(p)), label="r"))
    v = np.array(data.draw(st.lists(few, min_size=len(p), max_size=len(p)), label="values"))
    m = data.draw(st.integers(1, 4), label="m")
    mean = sum(
        math.prod(p[y] for y in draws) * best_of_k_means(r[list(draws)], v[list(draws)])
        for draws in itertools.product(range(len(p)), repeat=m)
    )
    for k in range(1, m + 1):
        assert mean[k - 1] == pytest.approx(float(best_of_n_pmf(p, r, k) @ v))


# --- curves over prompts --------------------------------------------------------------------------


def test_the_expected_maximum_of_normals() -> None:
    """Known in closed form for few: 0, 1/√π, 3/(2√π); against scipy's order statistics beyond."""
    assert [expected_normal_maximum(k) for k in (1, 2, 3)] == pytest.approx(
        [0, 1 / math.sqrt(math.pi), 1.5 / math.sqrt(math.pi)], abs=1e-9
    )
    for k in (8, 100):
        quantiles = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
        density = k * stats.norm.cdf(quantiles) ** (k - 1)
        assert expected_normal_maximum(k) == pytest.approx(np.mean(quantiles * density), abs=2e-3)


@pytest.mark.slow
def test_intervals_of_the_curve_cover() -> None:
    """Best-of-4's reward and gold win rate on 500 data sets of 60 prompts, and best-of-16's."""
    rng, sets = np.random.default_rng(0), 500
    correlation = 0.8  # of the gold reward with the one that chooses
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    # The chosen one's gold reward is 0.8·max + 0.6·N(0, 1), against N(0, 1).
    chosen = stats.norm.ppf(quantiles ** (1 / 4))
    gold_truth = np.mean(stats.norm.cdf(correlation * chosen / math.sqrt(0.36 + 1)))
    truth = np.array([expected_normal_maximum(4), gold_truth, expected_normal_maximum(16)])
    covered = np.zeros(3)
    for _ in range(sets):
        rewards = rng.normal(size=(60, 6))
        gold = correlation * rewards + 0.6 * rng.normal(size=rewards.shape)
        curve = best_of_k_curve(rewards, 4, further={"gold": gold}, beyond=(16,), resamples=1000)
        found = (curve[3].reward, curve[3].win_rate_by["gold"], curve[4].reward)
        covered += [it.low <= value <= it.high for it, value in zip(found, truth, strict=True)]
    assert np.all((covered / sets > 0.93) & (covered / sets < 0.97)), covered / sets


def test_beyond_the_draws_a_curve_is_marked_and_right_without_ties() -> None:
    rewards = np.random.default_rng(1).normal(size=(50, 12))
    curve = best_of_k_curve(rewards, 8, beyond=(16, 64), resamples=50)
    assert [point.k for point in curve] == [*range(1, 9), 16, 64]
    assert [point.extrapolated for point in curve] == [False] * 8 + [True] * 2
    for point in curve:
        assert point.win_rate.value == pytest.approx(BestOfN(point.k).win_rate())
        assert point.kl == BestOfN(point.k).kl()


def test_curves_that_cannot_be() -> None:
    rewards = np.zeros((3, 4))
    for n, beyond in ((4, ()), (3, (8,)), (0, ())):
        with pytest.raises(ValueError, match="curve"):
            best_of_k_curve(rewards, n, beyond=beyond)
    with pytest.raises(ValueError, match="same m"):
        best_of_k_curve([[1.0, 2.0], [1.0]], 1)
