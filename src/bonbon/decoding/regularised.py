"""Regularised best-of-n: weighs a reward, which is only a proxy, against a penalty.

RBoN takes the candidate with the largest reward minus penalty. SRBoN draws from the distribution on
the candidates that maximises the mean reward minus β times a divergence from the base model. RBoN
with β = 0 is best-of-n, ties included. β has the scale of the reward; `fit_beta` chooses it.

Sources: Jinnai et al. 2024 (arXiv 2404.01054): RBoN-KL and RBoN-WD, which is also MBR-BoN. Ichihara
et al. 2025 (arXiv 2502.12668): RBoN-L and the stochastic forms. Where the papers leave
details open, this follows their released code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from scipy.special import softmax

from bonbon.decoding.distances import EMBEDDING, distances, load_distance
from bonbon.decoding.soft import above_the_best
from bonbon.decoding.strategy import Floats, Generation, Source, WholeDraws, one_hot
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.rewards.reward import Reward

# --- formulas -------------------------------------------------------------------------------------


def penalised_best(rewards: Floats, penalty: Floats, beta: float) -> int:
    """Return argmax_i r_i − β·penalty_i, of tied candidates the first."""
    return int(np.argmax(rewards - beta * penalty))


def srbon_kl(rewards: Floats, log_base: Floats, beta: float) -> Floats:
    """Return the q, (n,), that maximises E_q[r] − β·KL(q ‖ π0 on the candidates): ∝ π0(y) e^(r/β).

    Args:
        log_base: ln π0 of the candidates up to a constant (nats), (n,).
    """
    return np.asarray(softmax(log_base + above_the_best(rewards, beta)))


def srbon_wd(rewards: Floats, apart: Floats, base: Floats, beta: float) -> Floats:
    """Return the q, (n,), that maximises E_q[r] − β·W1(q, base), W1 the optimal transport cost.

    This is a linear program over transport plans whose column sums are `base`, so each column is
    solved separately: the mass of candidate j goes to argmax_i r_i − β·d_ij, of tied ones to the
    first.

    Args:
        apart: the ground distances d_ij, (n, n).
        base: the distribution that mass is moved from, (n,).
    """
    goes_to = np.argmax(rewards[:, None] - beta * apart, axis=0)
    moved = np.bincount(goes_to, weights=base, minlength=len(rewards))
    return moved.astype(np.float64)


def base_logprobs(group: Group) -> Floats:
    """Return ln π0 of each candidate (nats), (n,), a probability divided among its copies.

    So π0 on the candidates is π0 on the set of different ones, however often each was drawn. Two
    candidates are copies if text and tokens agree; two tokenisations of a text are two outcomes of
    π0, whose probabilities add up. Raises BonbonError if one is missing.
    """
    outcomes = list(zip(group.completions, group.token_ids, strict=True))
    copies = Counter(outcomes)
    shared = np.array([math.log(copies[outcome]) for outcome in outcomes])
    return checked_logprobs(group) - shared


def checked_logprobs(group: Group) -> Floats:
    """Return ln π0 of each candidate, (n,) (nats). Raises BonbonError if one is missing."""
    logprobs = np.asarray(group.logprobs, dtype=np.float64)
    for k in np.flatnonzero(~np.isfinite(logprobs)):
        raise BonbonError(
            f"prompt {group.prompt_id}, completion {k + 1} of {group.n} came without a "
            "log-probability; draw from a server that returns them, or choose a strategy that "
            "needs none, such as soft_best_of_n"
        )
    return logprobs


# --- strategies -----------------------------------------------------------------------------------


class Regularised(WholeDraws):
    """Best-of-n with a regularisation of weight β."""

    beta: float = Field(1.0, ge=0, description="weight of the regularisation; 0: best-of-n")

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return the values that regularise the candidates; the same for every β."""
        raise NotImplementedError

    def weigh(self, group: Group, known: Floats) -> Floats:
        """Return the weights given the result of `known`, (n,); see `WholeDraws.weights`."""
        assert group.rewards is not None
        return one_hot(penalised_best(np.asarray(group.rewards), known, self.beta), group.n)

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        return self.weigh(group, self.known(group, source))


class RBoNKL(Regularised):
    """Choose argmax r(y) + β ln π0(y); β in rewards a nat. Penalises unlikely, so long, answers."""

    needs_logprobs: ClassVar[bool] = True

    beta: float = Field(
        0.01, ge=0, description="reward to give up for a nat of ln π0; 0: best-of-n"
    )

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return −ln π0(y), (n,) (nats)."""
        return -checked_logprobs(group)


class RBoNLength(Regularised):
    """Choose argmax r(y) − β/|y|, |y| in tokens with the end token; penalises short answers.

    A candidate without tokens counts as one token.
    """

    beta: float = Field(1.0, ge=0, description="reward × tokens; 0: best-of-n")

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return 1/|y|, (n,)."""
        return np.asarray(1 / np.maximum(group.lengths(), 1))


class _ByDistance(Regularised):
    loads: ClassVar[frozenset[str]] = frozenset({"distance", "embedding"})

    distance: str = Field(EMBEDDING, description="embedding (cosine), or package.module:function")
    embedding: str | None = Field(
        None, description="model that embeds the texts; None: the model that draws them"
    )

    @model_validator(mode="after")
    def _distance_is_one_of_two(self) -> Self:
        if self.distance != EMBEDDING and ":" not in self.distance:
            raise ValueError(f"distance is `{EMBEDDING}` or package.module:function")
        if self.distance != EMBEDDING and self.embedding is not None:
            raise ValueError("a distance function does not use `embedding`; leave it out")
        return self

    def generate(
        self, prompts: Sequence[EncodedPrompt], source: Source, reward: Reward | None
    ) -> list[Generation]:
        """See `Strategy.generate`."""
        load_distance(self.distance, self.embedding)
        return super().generate(prompts, source, reward)

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return the distances between candidates, (n, n)."""
        return distances(self.distance, self.embedding, group, source)


class RBoNWD(_ByDistance):
    """Choose argmax r(y) − β·mean_j d(y, y_j) over all n candidates, y included (MBR-BoN).

    The mean distance is W1 between y alone and the candidates.
    """

    beta: float = Field(
        1.0, ge=0, description="reward to give up for a distance of 1; 0: best-of-n"
    )

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return the mean distance of each candidate to all, (n,)."""
        return np.asarray(super().known(group, source).mean(axis=1))


class SRBoNKL(Regularised):
    """Draw from softmax(ln π0 + r/β), which maximises E r − β·KL from π0 on the candidates.

    β → 0 is best-of-n, with tied candidates weighted by π0; β → ∞ is π0 on the set of candidates.
    Copies share one outcome's probability (`base_logprobs`).
    """

    needs_logprobs: ClassVar[bool] = True

    beta: float = Field(1.0, gt=0, description="reward to give up for a nat of KL")

    def known(self, group: Group, source: Source | None) -> Floats:
        """Return ln π0 on the candidates up to a constant, (n,) (nats)."""
        return base_logprobs(group)

    def weigh(self, group: Group, known: Floats) -> Floats:
        """See `Regularised.weigh`."""
        assert group.rewards is not None
        return srbon_kl(np.asarray(group.rewards), known, self.beta)


class SRBoNWD(_ByDistance):
    """Draw from the q that maximises E r − β·W1 from π0 on the candidates, ground distance d.

    β = 0 is best-of-n; β → ∞ is π0 on the set of candidates, if different ones have distances above
    0. As in the authors' code, the mass to move is π0's, normalised on the candidates, and not 1/n
    each: for long completions nearly all of it lies on the likeliest one. Copies share one
    outcome's probability (`base_logprobs`).
    """

    needs_logprobs: ClassVar[bool] = True

    beta: float = Field(
        1.0, ge=0, description="reward to give up for a distance of 1; 0: best-of-n"
    )

    def weigh(self, group: Group, known: Floats) -> Floats:
        """See `Regularised.weigh`."""
        assert group.rewards is not None
        base = softmax(base_logprobs(group))
        return srbon_wd(np.asarray(group.rewards), known, base, self.beta)
