"""Measured values with their 95% intervals.

Completions of one prompt are not independent, so values are computed per prompt first. A figure is
the mean over prompts, or a statistic of such means, and the bootstrap resamples prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Figure:
        """Make a figure without sampling error."""
        return cls(value, value, value)


def bootstrap(
    per_prompt: Sequence[Floats],
    statistic: Callable[..., ArrayLike],
    resamples: int = 2000,
    seed: int = 0,
) -> Figure:
    """Compute a statistic of means over prompts, with its bootstrap 95% interval over prompts.

    The expanded percentile interval (Hesterberg 2015, arXiv 1411.5279): its percentiles lie
    slightly further out, so that the interval is not too narrow for few prompts. For fewer than ten
    prompts it is Student's interval with the jackknife's standard error; for one prompt it is the
    value alone.

    Args:
        per_prompt: arrays of shape (prompts,), resampled together.
        statistic: maps the arrays' means, each a scalar or of shape (resamples,), to values.
    """
    columns = np.stack([np.asarray(values, dtype=np.float64) for values in per_prompt])
    value = float(np.asarray(statistic(*columns.mean(axis=1))))
    prompts = columns.shape[1]
    if 1 < prompts < _FEWEST_TO_RESAMPLE:
        return _jackknife(columns, statistic, value)
    means = columns @ _resampled(prompts, resamples, seed).T / prompts
    tail = _tail(prompts)
    low, high = np.quantile(np.asarray(statistic(*means)), [tail, 1 - tail])
    return Figure(value, float(low), float(high))


# Fewer prompts give too few different resamples for percentiles.
_FEWEST_TO_RESAMPLE = 10


def _jackknife(columns: Floats, statistic: Callable[..., ArrayLike], value: float) -> Figure:
    """Compute Student's interval about the value, with the jackknife's standard error."""
    prompts = columns.shape[1]
    without = (columns.sum(axis=1, keepdims=True) - columns) / (prompts - 1)
    left = np.asarray(statistic(*without), dtype=np.float64)
    error = ((prompts - 1) / prompts * np.sum((left - left.mean()) ** 2)) ** 0.5
    half = float(stdtrit(prompts - 1, 0.975) * error)
    return Figure(value, value - half, value + half)


@lru_cache(maxsize=64)
def _tail(prompts: int) -> float:
    """Compute the tail probability Φ(−√(P/(P−1)) · t(0.975; P−1)), which is below 2.5%."""
    freedom = max(prompts - 1, 1)
    return float(ndtr(-((prompts / freedom) ** 0.5) * stdtrit(freedom, 0.975)))


@lru_cache(maxsize=2)  # an evaluation has hundreds of figures over the same prompts
def _resampled(prompts: int, resamples: int, seed: int) -> Floats:
    """Count how often each prompt is in each resample, shape (resamples, prompts)."""
    drawn = np.random.default_rng(seed).integers(0, prompts, (resamples, prompts))
    drawn += prompts * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * prompts)
    return counts.reshape(resamples, prompts).astype(np.float64)


def clustered_mean(per_prompt: ArrayLike) -> Figure:
    """Compute the mean over prompts with Student's interval: ± t(0.975; prompts − 1) · s/√prompts.

    The closed form of `bootstrap` for a mean. Each prompt has one value, so the variance s² over
    prompts includes the variance of its draws. Raises ValueError for fewer than two prompts.
    """
    values = np.asarray(per_prompt, dtype=np.float64)
    if len(values) < 2:
        raise ValueError("an interval needs two prompts or more")
    mean = float(values.mean())
    half = float(stdtrit(len(values) - 1, 0.975)) * standard_error(values)
    return Figure(mean, mean - half, mean + half)


def standard_error(per_prompt: ArrayLike) -> float:
    """Compute s/√prompts, the standard error of a mean over two prompts or more."""
    values = np.asarray(per_prompt, dtype=np.float64)
    return float(values.std(ddof=1)) / len(values) ** 0.5
