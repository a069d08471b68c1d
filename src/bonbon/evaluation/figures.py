"""Measured values with their 95% intervals.

Completions of one prompt are not independent, so everything is computed per prompt first; a figure
is the mean over prompts, or a statistic of such means, and prompts are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Figure:
        """A figure known without sampling error."""
        return cls(value, value, value)


def bootstrap(
    per_prompt: Sequence[Floats],
    statistic: Callable[..., ArrayLike],
    resamples: int = 2000,
    seed: int = 0,
) -> Figure:
    """A statistic of means over prompts, with its percentile-bootstrap 95% interval over prompts.

    Args:
        per_prompt: arrays of shape (prompts,), resampled together.
        statistic: maps the arrays' means, each a scalar or of shape (resamples,), to values.
    """
    columns = np.stack([np.asarray(values, dtype=np.float64) for values in per_prompt])
    value = float(np.asarray(statistic(*columns.mean(axis=1))))
    generator = np.random.default_rng(seed)
    prompts = columns.shape[1]
    means = np.empty((len(columns), resamples))
    for b in range(resamples):
        means[:, b] = columns[:, generator.integers(0, prompts, prompts)].mean(axis=1)
    low, high = np.percentile(np.asarray(statistic(*means)), [2.5, 97.5])
    return Figure(value, float(low), float(high))
