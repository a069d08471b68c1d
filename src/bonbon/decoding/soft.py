"""Best-of-n made softer: a softmax over the draws, or a random number of them."""

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
    """(r_i − max r)/τ, (n,): at most 0, and −inf in place of an overflow for the smallest τ."""
    r = np.asarray(rewards, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.asarray((r - r.max()) / tau)


class SoftBestOfN(WholeDraws):
    """Draw n, choose draw i with probability proportional to e^(r_i/τ).

    As n grows, the law of the answer tends to the optimum of E r − τ·KL, π0(y) e^(r(y)/τ)/Z, with
    a KL divergence from it in O(1/n) (Verdun et al. 2025, arXiv 2505.03156, whose λ is τ). τ → 0 is
    best-of-n, tied draws sharing their probability; τ → ∞ is a single draw. A text drawn twice
    counts twice.
    """

    tau: float = Field(1.0, gt=0, description="temperature, in units of the reward")

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        assert group.rewards is not None
        return np.asarray(softmax(above_the_best(group.rewards, self.tau)))


class BestOfPoisson(BestOfN):
    """Draw 1 + Poisson(n − 1), n on average, keep the best; of tied candidates the first drawn.

    The tilt f(u) = (1 + μu) e^(μ(u−1)), `bonbon.tilt.BestOfPoisson` with μ = n − 1, whose win rate
    is all but the largest one at its KL (Khalaf et al. 2025, arXiv 2506.19248). A prompt's number
    of draws is the same for the same seed.
    """

    def count(self, prompt: EncodedPrompt, config: SamplingConfig) -> int:
        """See `WholeDraws.count`."""
        return poisson_count(config.n - 1, config.seed, prompt.prompt_id)


def poisson_count(mu: float, seed: int, prompt_id: str) -> int:
    """1 + a Poisson number of mean μ ≥ 0 that belongs to the prompt."""
    return 1 + poisson_quantile(uniform_stream(seed, "count", prompt_id, 0, 1)[0], mu)


def poisson_quantile(p: float, mu: float) -> int:
    """The smallest k ≥ 0 with P(K ≤ k) ≥ p, K Poisson of mean μ ≥ 0, for p in [0, 1)."""
    from scipy.special import pdtr, pdtrik

    k = math.ceil(pdtrik(p, mu))
    # At a step of the CDF the real-valued inverse may be rounded to just past it.
    return k - 1 if k > 0 and pdtr(k - 1, mu) >= p else k
