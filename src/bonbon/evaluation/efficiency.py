"""Ratios of a policy's gain to best-of-n's, and of its KL to the least that wins as often."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.figures import Floats
from bonbon.tilt.exponential import optimal_kl

# The rounding error of sums of weights; a win rate this close to ½ counts as ½.
ROUNDING = 1e-9


def recovered_share(win: ArrayLike, best: ArrayLike) -> Floats:
    """Compute (win − ½)/(best-of-n's win rate `best` − ½), elementwise; 0 where that gains nothing.

    With a constant reward best-of-n gains nothing, up to rounding.
    """
    gain = np.asarray(best) - 0.5
    return np.divide(np.asarray(win) - 0.5, gain, out=np.zeros_like(gain), where=gain > ROUNDING)


def kl_efficiency(win: ArrayLike, kl: ArrayLike) -> Floats:
    """Compute the least KL for a win rate / the KL spent (nats), elementwise; 0 for ½ or less."""
    wins, kls = np.broadcast_arrays(np.asarray(win, np.float64), np.asarray(kl, np.float64))
    gains = (wins > 0.5 + ROUNDING) & (kls > 0)
    # A win rate of 1 has an infinite least KL; a sample cannot distinguish it from one below 1.
    least = optimal_kl(np.clip(wins, 0.5, 1 - 1e-6))
    return np.asarray(np.where(gains, least / np.where(kls > 0, kls, 1.0), 0.0))
