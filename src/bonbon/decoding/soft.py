"""Soft variants of best-of-n: a softmax over the draws, or a random number of draws."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field
from scipy.special import softmax

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.strategy import Floats, Source, WholeDraws
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.random_streams import uniform_stream


def above_the_best(rewards: ArrayLike, tau: float) -> Floats:
    """Return (r_i − max r)/τ, (n,): at most 0; −inf where a very small τ overflows."""
    r = np.asarray(rewards, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.asarray((r - r.max()) / tau)


class SoftBestOfN(WholeDraws):
    """Draw n and choose draw i with probability proportional to e^(r_i/τ).

    As n grows, the answer's distribution tends to the optimum of E r − τ·KL, π0(y) e^(r(y)/τ)/Z;
    its KL divergence from it is O(1/n) (Verdun et al. 2025, arXiv 2505.03156, whose λ is τ). τ → 0
    is best-of-n, with tied draws equally likely; τ → ∞ is a single draw. A text drawn twice counts
    twice.
    """

    tau: float = Field(1.0, gt=0, description="temperature, in units of the reward")

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        assert group.rewards is not None
        return np.asarray(softmax(above_the_best(group.rewards, self.tau)))


class BestOfPoisson(BestOfN):
    """Draw 1 + Poisson(n − 1), n on average, and keep the best; of tied ones the first drawn.

    The tilt f(u) = (1 + μu) e^(μ(u−1)), `bonbon.tilt.BestOfPoisson` with μ = n − 1, whose win rate
    is nearly the largest possible at its KL (Khalaf et al. 2025, arXiv 2506.19248). The same seed
    gives a prompt the same number of draws.
    """

    def count(self, prompt: EncodedPrompt, config: SamplingConfig) -> int:
        """See `WholeDraws.count`."""
        return poisson_count(config.n - 1, config.seed, prompt.prompt_id)


def poisson_count(mu: float, seed: int, prompt_id: str) -> int:
    """Return 1 + a Poisson number of mean μ ≥ 0, keyed by the seed and the prompt."""
    return 1 + poisson_quantile(uniform_stream(seed, "count", prompt_id, 0, 1)[0], mu)


def poisson_quantile(p: float, mu: float) -> int:
    """Return the smallest k ≥ 0 with P(K ≤ k) ≥ p, for K Poisson of mean μ ≥ 0 and p in [0, 1)."""
    from scipy.special import pdtr, pdtrik

    k = math.ceil(pdtrik(p, mu))
    # At a step of the CDF rounding may push the real-valued inverse just past it.
    return k - 1 if k > 0 and pdtr(k - 1, mu) >= p else k
