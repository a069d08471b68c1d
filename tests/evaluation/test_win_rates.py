"""Win rates against double loops, and their intervals against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bonbon.evaluation import (
    clustered_mean,
    paired_difference,
    win_rate,
    win_rate_figure,
    win_rate_over_prompts,
    win_rate_variance,
)
from bonbon.tilt.discrete import win_rate_pmf
from support.profiles import quick

Floats = NDArray[np.float64]


# Few values, so that ties are common.
few = st.integers(-1, 2).map(float)


def beats(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


@quick
@given(st.lists(few, min_size=1, max_size=7), st.lists(few, min_size=1, max_size=7))
def test_win_rate_by_double_loop(ours: list[float], base: list[float]) -> None:
    expected = sum(beats(a, b) for a in ours for b in base) / (len(ours) * len(base))
    assert win_rate(ours, base) == pytest.approx(expected)
    assert win_rate(ours, base) + win_rate(base, ours) == pytest.approx(1)


@pytest.mark.slow
@quick
@given(st.data())
def test_win_rate_is_unbiased(data: st.DataObject) -> None:
    """Its mean over all draws of two small laws is their exact win rate."""
    weights = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3), label="p")
    p = np.array(weights) / sum(weights)
    q = np.array(data.draw(st.permutations(list(p)), label="q"))
    r = np.array(data.draw(st.lists(few, min_size=len(p), max_size=len(p)), label="r"))
    mean = sum(
        math.prod(q[y] for y in ours) * math.prod(p[y] for y in base)
        * win_rate(r[list(ours)], r[list(base)])
        for ours in itertools.product(range(len(p)), repeat=2)
        for base in itertools.product(range(len(p)), repeat=3)
    )  # fmt: skip
    assert mean == pytest.approx(win_rate_pmf(q, p, r))


# --- closed-form variance -------------------------------------------------------------------------


@pytest.mark.slow
@quick
@given(st.data())
def test_the_draws_variance_is_unbiased(data: st.DataObject) -> None:
    """Its mean over all draws of two small laws is the variance of the win rate over them."""
    laws = []
    for side in ("ours", "theirs"):
        weights = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3), label=side)
        values = data.draw(st.lists(few, min_size=len(weights), max_size=len(weights)))
        laws.append((np.array(weights) / sum(weights), np.array(values)))
    (p, x), (q, y) = laws
    k, other = data.draw(st.integers(2, 3), label="k"), data.draw(st.integers(2, 3), label="l")
    mean = square = estimate = 0.0
    for ours in itertools.product(range(len(p)), repeat=k):
        for theirs in itertools.product(range(len(q)), repeat=other):
            chance = math.prod(p[i] for i in ours) * math.prod(q[j] for j in theirs)
            won = win_rate(x[list(ours)], y[list(theirs)])
            mean += chance * won
            square += chance * won**2
            estimate += chance * win_rate_variance(x[list(ours)], y[list(theirs)])
    assert estimate == pytest.approx(square - mean**2, abs=1e-12)


def simulated(rng: np.random.Generator, prompts: int, k: int) -> tuple[Floats, Floats]:
    """Rewards of two policies whose prompts differ in how far apart the two are."""
    shift = rng.normal(0.4, 0.8, size=(prompts, 1))
    return rng.normal(size=(prompts, k)) + shift, rng.normal(size=(prompts, k))


def expected_win_rate() -> float:
    """P(N(0.4, 0.8²) + N(0, 1) > N(0, 1)) = Φ(0.4/√(0.64 + 2))."""
    return 0.5 * (1 + math.erf(0.4 / math.sqrt(2.64) / math.sqrt(2)))


@pytest.mark.slow
def test_both_intervals_cover() -> None:
    """600 data sets of 80 prompts and 4 completions: 95% of the intervals hold the truth."""
    rng, truth, sets = np.random.default_rng(0), expected_win_rate(), 600
    covered = np.zeros(2)
    widths = np.zeros(2)
    for _ in range(sets):
        found = win_rate_over_prompts(*simulated(rng, 80, 4), resamples=500)
        for index, it in enumerate((found.closed_form, found.bootstrap)):
            covered[index] += it.low <= truth <= it.high
            widths[index] += it.high - it.low
    assert np.all((covered / sets > 0.93) & (covered / sets < 0.97)), covered / sets
    assert widths[1] == pytest.approx(widths[0], rel=0.04)  # Student's t is a little wider


@pytest.mark.slow
def test_the_draws_share() -> None:
    """With the same prompts drawn from again and again, the variance is what the share says."""
    rng = np.random.default_rng(1)
    shift = rng.normal(0.4, 0.8, size=(60, 1))
    shares, means, errors = [], [], []
    for _ in range(400):
        ours, theirs = rng.normal(size=(60, 3)) + shift, rng.normal(size=(60, 3))
        found = win_rate_over_prompts(ours, theirs, resamples=10)
        assert found.draws_share is not None
        shares.append(found.draws_share * found.standard_error**2)
        means.append(found.bootstrap.value)
        errors.append(found.standard_error**2)
    assert np.mean(shares) == pytest.approx(np.var(means, ddof=1), rel=0.15)
    assert np.mean(shares) < np.mean(errors)


def test_paired_differences_cover_and_are_narrower() -> None:
    rng, sets, covered = np.random.default_rng(2), 600, 0
    wide = narrow = 0.0
    for _ in range(sets):
        easy = rng.normal(0.7, 0.15, size=80)  # what both find easy in a prompt
        first, second = easy + rng.normal(0.05, 0.05, 80), easy + rng.normal(0, 0.05, 80)
        found = paired_difference(first, second, resamples=500)
        covered += found.low <= 0.05 <= found.high
        narrow += found.high - found.low
        alone = clustered_mean(first)
        wide += alone.high - alone.low
    assert 0.93 < covered / sets < 0.97
    assert narrow < 0.7 * wide


def test_outright_wins_are_not_certain() -> None:
    """20 prompts won outright: a win rate of 0.83 would do so in 1 of 40 cases."""
    figure = win_rate_figure(np.ones(20))
    assert (figure.value, figure.high) == (1, 1)
    assert figure.low**20 == pytest.approx(0.025)
    lost = win_rate_figure(np.zeros(20))
    assert (lost.low, lost.high) == (0, pytest.approx(1 - figure.low))


def test_win_rates_of_different_numbers_of_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        win_rate_over_prompts([[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="two prompts"):
        win_rate_over_prompts([[1.0, 2.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="two completions"):
        win_rate_variance([1.0], [1.0, 2.0])
