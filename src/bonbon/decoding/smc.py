"""Sequential Monte Carlo: draws from the tilt π0(y) e^(r(y)/τ)/Z by weighted particles.

Soft best-of-n draws from the same tilt, but it weights whole completions by e^(r/τ) once, at the
end, when the weights may be very unequal. Token by token the tilt is π0(y_≤t) V(y_≤t)/Z with
V(y_≤t) = E[e^(r/τ) | y_≤t] under π0. V is not known, so a *twist* ψ(y_≤t) approximates it. At each
checkpoint a particle's weight is multiplied by the ratio of its ψ to that at the checkpoint before.
When the weights become too unequal, particles with low weights are dropped and ones with high
weights branched in their place. Over a whole completion the ratios multiply to e^(r(y)/τ), so any
positive ψ has the same target; a ψ closer to V, up to a constant, makes the estimates less noisy.

Sources: Zhao et al. 2024 (arXiv 2404.17546), twisted SMC for language models; Loula et al. 2025
(arXiv 2504.13139), SMC with potentials for control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import logsumexp, softmax

from bonbon.decoding.partial import Partial, Score, by_reward, token_log_ratios
from bonbon.decoding.stepwise import MOST_TOKENS, ScoredRows, Stepwise
from bonbon.decoding.strategy import Floats, Generation, Source, StepwiseSource, pick
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.random_streams import uniform_stream
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward

# --- weights --------------------------------------------------------------------------------------


def log_mean_exp(x: ArrayLike) -> float:
    """Return ln (1/n) Σ_i e^(x_i)."""
    values = np.asarray(x, dtype=np.float64)
    return float(logsumexp(values) - math.log(len(values)))


def effective_sample_size(log_weights: ArrayLike) -> float:
    """Return (Σ w)²/Σ w², between 1 (one particle has all the weight) and n (equal weights)."""
    weights = softmax(log_weights)
    return float(1 / np.sum(weights**2))


def systematic_ancestors(weights: ArrayLike, uniform: float) -> NDArray[np.intp]:
    """Return the resampled particles, (n,), ascending: the inverse CDF at (i + u)/n, i = 0..n−1.

    Particle i occurs n·w_i times on average over u, and always ⌊n·w_i⌋ or ⌈n·w_i⌉ times (systematic
    resampling, Kitagawa 1996). `weights` need not sum to 1; u lies in [0, 1).
    """
    cdf = np.cumsum(np.asarray(weights, dtype=np.float64))
    places = (np.arange(len(cdf)) + uniform) / len(cdf) * cdf[-1]
    last = np.flatnonzero(np.diff(cdf, prepend=0.0))[-1]
    return np.minimum(np.searchsorted(cdf, places, side="right"), last)


# --- estimates ------------------------------------------------------------------------------------


def log_normaliser(group: Group) -> float:
    """Return ln of SMC's estimate of Z = E[e^(r(y)/τ)] under π0, from SMC's particles.

    The estimate of Z is unbiased; its logarithm is too low on average.
    """
    return log_mean_exp(group.metrics["log_weight"])


# --- the strategy ---------------------------------------------------------------------------------


class SMC(Stepwise):
    """Weight n particles by the twist at checkpoints, and draw the answer by the final weights.

    The twist is ψ = e^(s/τ) with s the partial score. It is 1 for the empty completion and e^(r/τ)
    for a whole one, so the final weights are exact for the target π0(y) e^(r(y)/τ)/Z. If the
    effective sample size at a checkpoint is below `ess_threshold`·n, particles are resampled
    (systematically) and get equal weights. Copies share cache lines and draw from random streams of
    their own. Finished particles are weighted and resampled like all others. When resampling cannot
    happen (no checkpoint before the end, or threshold 0), no partial completion is scored, and this
    is soft best-of-n at the same cost.

    With `partial` `{implicit: MODEL}` the twist is π*(y_≤t)/π0(y_≤t) of the tuned policy π*. It is
    proportional to V if π* is the target itself; the log-ratios are not weighted, and τ drops out.

    The group holds the n particles, with the metrics `weight` (sums to 1) and `log_weight`
    (unnormalised, including the averages of resampling; see `log_normaliser`).
    """

    loads: ClassVar[frozenset[str]] = frozenset({"partial"})

    tau: float = Field(1.0, gt=0, description="temperature, in units of the reward")
    checkpoint_tokens: int = Field(
        32, ge=1, le=MOST_TOKENS, description="tokens between checkpoints"
    )
    ess_threshold: float = Field(
        0.5, ge=0, le=1, description="resample below this effective sample size, as a fraction of n"
    )
    partial: Partial = Field(
        "reward",
        description="what partial completions are scored by: reward, or {implicit: MODEL} for the "
        "log-ratio of a tuned model to the base model",
    )

    def score(self, source: Source, reward: Reward) -> Score:
        """See `Stepwise.score`."""
        if self.partial == "reward":
            return by_reward(reward)
        return _implicit_score(self.partial.implicit, source, by_reward(reward), self.tau)

    def answer(
        self, prompt: EncodedPrompt, source: StepwiseSource, score: Score, reward: Reward
    ) -> Generation:
        """See `Stepwise.answer`. Raises BonbonError if r/τ overflows."""
        n, enough = source.config.n, self.ess_threshold * source.config.n
        rows = ScoredRows(source.start(prompt, n), score)
        weights = _Weights(np.zeros(n), np.zeros(n))
        rows.draw(self.checkpoint_tokens)
        while rows.unfinished:
            if enough > 1:  # the effective sample size is never below 1
                weights = weights.with_twists(self._log_twists(rows))
                if effective_sample_size(weights.log) < enough:
                    uniform = _resampling_uniform(rows, source.config.seed, prompt.prompt_id)
                    ancestors = systematic_ancestors(softmax(weights.log), uniform)
                    rows.select(ancestors.tolist())
                    weights = weights.resampled(ancestors)
            rows.draw(self.checkpoint_tokens)
        weights = weights.with_twists(self._log_twists(rows))
        group = rows.scored().with_metric("weight", softmax(weights.log))
        group = group.with_metric("log_weight", weights.log)
        chosen = pick(softmax(weights.log), source.config.seed, prompt.prompt_id)
        return Generation(group, chosen, rows.cost())

    def _log_twists(self, rows: ScoredRows) -> Floats:
        with np.errstate(over="ignore"):
            return np.array(rows.scored().rewards) / self.tau


@dataclass(frozen=True)
class _Weights:
    """Unnormalised log-weights of the particles, and the log-twists they include, (n,)."""

    log: Floats
    twists: Floats

    def with_twists(self, twists: Floats) -> _Weights:
        """Return the weights times the ratio of these twists to the previous ones."""
        with np.errstate(over="ignore", invalid="ignore"):
            log = self.log + twists - self.twists
        if not np.all(np.isfinite(log)):
            raise BonbonError("tau is too small for rewards of this size; raise it")
        return _Weights(log, twists)

    def resampled(self, ancestors: NDArray[np.intp]) -> _Weights:
        """Return equal weights of the same mean."""
        return _Weights(np.full(len(self.log), log_mean_exp(self.log)), self.twists[ancestors])


def _resampling_uniform(rows: ScoredRows, seed: int, prompt_id: str) -> float:
    """Return the checkpoint's uniform number, keyed by the longest row, which grows each time."""
    step = max(rows.rows.lengths())
    return float(uniform_stream(seed, "resample", prompt_id, step, 1)[0])


def _implicit_score(name: str, source: Source, final: Score, tau: float) -> Score:
    """Return a score: the reward of whole completions, τ ln π*(y_≤t)/π0(y_≤t) of partial ones."""
    log_ratios = token_log_ratios(name, source)

    def score(group: Group, whole: Sequence[bool]) -> Floats:
        scores = np.empty(group.n)
        ended = [row for row, is_whole in enumerate(whole) if is_whole]
        going = [row for row, is_whole in enumerate(whole) if not is_whole]
        if ended:
            scores[ended] = final(group.take(ended), [True] * len(ended))
        if going:
            scores[going] = [tau * math.fsum(r) for r in log_ratios(group.take(going))]
        return scores

    return score
