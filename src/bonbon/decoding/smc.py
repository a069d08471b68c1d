"""Sequential Monte Carlo: particles of the tilt π0(y) e^(r(y)/τ)/Z, weighted on the way.

The tilt that soft best-of-n draws from, seen step by step. Soft best-of-n draws whole completions
from π0 and weighs them by e^(r/τ) once, at the end, when weights may be as unequal as they like.
Seen token by token the same tilt is π0(y_≤t) V(y_≤t)/Z with V(y_≤t) = E[e^(r/τ) | y_≤t] under π0.
V is not known, so a *twist* ψ(y_≤t) stands for it: particles are weighted by ψ's ratio from one
checkpoint to the next, and where the weights have become too unequal the unpromising particles are
dropped and the promising ones branched in their place. The ratios multiply to e^(r(y)/τ) over a
whole completion, so that any positive ψ has the same target; one nearer to V, up to a constant,
makes the estimates less noisy.

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
    """ln (1/n) Σ_i e^(x_i)."""
    values = np.asarray(x, dtype=np.float64)
    return float(logsumexp(values) - math.log(len(values)))


def effective_sample_size(log_weights: ArrayLike) -> float:
    """(Σ w)²/Σ w², between 1 (one particle has all the weight) and n (all have the same)."""
    weights = softmax(log_weights)
    return float(1 / np.sum(weights**2))


def systematic_ancestors(weights: ArrayLike, uniform: float) -> NDArray[np.intp]:
    """Which particles go on, (n,), rising: the inverse CDF of `weights` at (i + u)/n, i = 0..n−1.

    Particle i goes on n·w_i times on average over u, and ⌊n·w_i⌋ or ⌈n·w_i⌉ times always (Kitagawa
    1996, systematic resampling). `weights` need not sum to 1; u lies in [0, 1).
    """
    cdf = np.cumsum(np.asarray(weights, dtype=np.float64))
    places = (np.arange(len(cdf)) + uniform) / len(cdf) * cdf[-1]
    last = np.flatnonzero(np.diff(cdf, prepend=0.0))[-1]
    return np.minimum(np.searchsorted(cdf, places, side="right"), last)


# --- estimates ------------------------------------------------------------------------------------


def log_normaliser(group: Group) -> float:
    """ln of SMC's estimate of Z = E[e^(r(y)/τ)] under π0, from the particles that SMC returned.

    The estimate of Z is unbiased, its logarithm is too low on average.
    """
    return log_mean_exp(group.metrics["log_weight"])


def tilted_expectation(group: Group, values: ArrayLike) -> float:
    """Σ_i w_i f(y_i), SMC's estimate of E f(y) under π0(y) e^(r(y)/τ)/Z.

    Args:
        group: the particles that SMC returned.
        values: f of each particle, (n,). The bias falls as 1/n, the error as 1/√n.
    """
    return float(np.asarray(values, dtype=np.float64) @ np.asarray(group.metrics["weight"]))


# --- the strategy ---------------------------------------------------------------------------------


class SMC(Stepwise):
    """n particles weighted by the twist at checkpoints; the answer is drawn by the final weights.

    The twist is ψ = e^(s/τ) with s the partial score; that of the empty completion is 1 and that of
    a whole one e^(r/τ), so the final weights are exact for the target π0(y) e^(r(y)/τ)/Z. Where the
    effective sample size at a checkpoint is below `ess_threshold`·n, particles are resampled
    (systematically) and their weights made equal; copies share their cache lines and draw from
    random streams of their own. A particle that has ended is weighted, and resampled, like any
    other. When nothing can be resampled (one checkpoint behind the end, or threshold 0) nothing
    partial is scored, and this is soft best-of-n at its cost.

    With `partial` `{implicit: MODEL}` the twist is π*(y_≤t)/π0(y_≤t) of the tuned policy π*, which
    is proportional to V where π* is the target itself: unweighted, and without τ.

    The group holds the n particles, with the metrics `weight` (sums to 1) and `log_weight`
    (unnormalised, what resampling has averaged included; see `log_normaliser`).
    """

    loads: ClassVar[frozenset[str]] = frozenset({"partial"})

    tau: float = Field(1.0, gt=0, description="temperature, in units of the reward")
    checkpoint_tokens: int = Field(
        32, ge=1, le=MOST_TOKENS, description="tokens between checkpoints"
    )
    ess_threshold: float = Field(
        0.5, ge=0, le=1, description="resample below this effective sample size, as a part of n"
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
        """See `Stepwise.answer`; also raises BonbonError where r/τ overflows."""
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
    """Unnormalised log-weights of the particles, and the log-twists that are in them, (n,)."""

    log: Floats
    twists: Floats

    def with_twists(self, twists: Floats) -> _Weights:
        """Times the ratio of these twists to the ones before."""
        with np.errstate(over="ignore", invalid="ignore"):
            log = self.log + twists - self.twists
        if not np.all(np.isfinite(log)):
            raise BonbonError("tau is too small for rewards of this size; raise it")
        return _Weights(log, twists)

    def resampled(self, ancestors: NDArray[np.intp]) -> _Weights:
        """Equal weights of the same mean."""
        return _Weights(np.full(len(self.log), log_mean_exp(self.log)), self.twists[ancestors])


def _resampling_uniform(rows: ScoredRows, seed: int, prompt_id: str) -> float:
    """A number of the checkpoint's own: the longest row is longer at each."""
    step = max(rows.rows.lengths())
    return float(uniform_stream(seed, "resample", prompt_id, step, 1)[0])


def _implicit_score(name: str, source: Source, final: Score, tau: float) -> Score:
    """The reward of whole completions, τ ln π*(y_≤t)/π0(y_≤t) of partial ones."""
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
