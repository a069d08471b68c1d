"""Intervals: the bootstrap over prompts, and the closed form for a mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bonbon.evaluation import bootstrap, clustered_mean


def test_bootstrap_coverage() -> None:
    """A 95% interval covers in about 95% of trials: 600 of them, 150 skewed prompts each."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(600):
        figure = bootstrap([rng.exponential(size=150)], lambda mean: mean, 500, seed=trial % 2)
        covered += figure.low <= 1.0 <= figure.high
        assert figure.low <= figure.value <= figure.high
    assert 0.93 <= covered / 600 <= 0.97


def test_bootstrap_width() -> None:
    """The interval is ±1.96 standard errors of the mean when the mean is nearly normal."""
    values = np.random.default_rng(1).normal(size=900)
    figure = bootstrap([values], lambda mean: mean)
    expected = 1.96 * values.std() / 30
    assert figure.value == pytest.approx(values.mean())
    assert (figure.high - figure.low) / 2 == pytest.approx(expected, rel=0.1)


def test_bootstrap_is_deterministic_by_seed() -> None:
    values = np.random.default_rng(2).random(50)
    first, again, other = (bootstrap([values], lambda mean: mean, 200, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_bootstrap_resamples_columns_together() -> None:
    """Figures of one prompt stay together: a difference of equal columns has no spread at all."""
    values = np.random.default_rng(3).random(40)
    figure = bootstrap([values, values + 2], lambda a, b: b - a)
    assert (figure.low, figure.high) == pytest.approx((2, 2))


@pytest.mark.parametrize("prompts", [2, 3, 5, 9])
def test_few_prompts_get_the_jackknife_s_interval(prompts: int) -> None:
    """Of a mean it is Student's exactly, so it covers; of a ratio it is close to that."""
    values = np.random.default_rng(6).normal(1, 0.3, size=(2, prompts))
    mean = bootstrap([values[0]], lambda mean: mean)
    expected = clustered_mean(values[0])
    assert (mean.low, mean.high) == pytest.approx((expected.low, expected.high))
    ratio = bootstrap(list(values), lambda a, b: a / b)
    assert ratio.low < ratio.value < ratio.high


def test_one_prompt_has_no_interval() -> None:
    figure = bootstrap([np.array([0.7])], lambda mean: mean)
    assert (figure.low, figure.value, figure.high) == (0.7, 0.7, 0.7)


def test_the_closed_form_is_student_s_interval() -> None:
    values = np.random.default_rng(4).normal(size=12)
    figure = clustered_mean(values)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (figure.value, figure.low, figure.high) == pytest.approx((values.mean(), low, high))
    with pytest.raises(ValueError, match="two prompts"):
        clustered_mean([1.0])
