"""Length-controlled win rates: what a judge would prefer if both answers were equally long.

Judges favour long answers. AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, section 3) regresses
the preference for model m over the baseline on instruction i on the model, the length difference
and the instruction's difficulty,

    logit P = θ_m + φ_m · tanh((len_mi − len_bi) / s_m) + ψ_m · γ_i,

and sets the length term to zero: the length-controlled win rate is mean_i σ(θ_m + ψ_m γ_i). Labels
may be soft (a preference in [0, 1]); the loss is the cross-entropy. s_m is the standard deviation
of the model's length differences over its judged pairs, as in AlpacaEval, so any unit of length
will do. The differences are not centred: the term is zero at equal lengths.

How each part is estimated:

- γ, as in AlpacaEval, from all models at once with ψ_m = 1, but as a random effect: γ_i is standard
  normal, an L2 penalty of 1/2. It is then standardised. Models whose preferences never vary are
  left out. A term with one ψ_m a model needs three models to be identified, as a factor needs three
  indicators; with fewer it is dropped.
- θ, φ and ψ model by model, γ given, with an L2 penalty `RIDGE`/2 on each, a normal prior of
  standard deviation 32 logits. It moves a win rate by about 1e-6 at several hundred instructions
  and keeps a model that wins everything finite.
- The length effect is first of all the judge's, so with four models or more each φ_m is drawn
  towards a common mean by random-effects meta-analysis (DerSimonian and Laird 1986, with Morris's
  1983 factor for few models), and θ and ψ are fitted again. A model that says little about its φ_m
  borrows from the others; one that says much keeps its own. AlpacaEval's counterpart is a fifth of
  a data set more: its baseline's own answers, made verbose and concise by prompting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, stdtrit

from bonbon.evaluation.figures import Figure, Floats

RIDGE = 1e-3


@dataclass(frozen=True)
class LengthControlled:
    """Length-controlled win rates and their parameters, one entry a model.

    `length_effects` are the φ_m (logits per unit of tanh), 0 where the lengths do not vary.
    `difficulty` is γ, shape (instructions,): as it was given, or else fitted on all models, with
    mean 0 and standard deviation 1, or all 0 where the term was dropped. Where ψ_m > 0, a high γ is
    an instruction on which the baseline is easily beaten.
    """

    win_rates: tuple[Figure, ...]
    length_effects: tuple[float, ...]
    difficulty: Floats


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    difficulty: ArrayLike | None = None,
) -> LengthControlled:
    """Estimate each model's length-controlled win rate over the baseline, with its 95% interval.

    Every instruction counts the same, however many of its pairs were judged, and the mean is over
    the instructions judged for any model, so that models with gaps are compared on the same ones.
    A model equal to the baseline (preferences of 0.5, no length differences) gets exactly 0.5, and
    swapping the two sides gives 1 minus the win rate.

    The interval is the delta method's on the logit scale, with a sandwich variance clustered by
    instruction (an instruction's pairs, and its models, may depend on each other) and Student's t.
    γ counts as known. What its fit leaves uncertain is not in the interval: simulated at 800
    instructions with one hard label each, where lengths follow difficulty, intervals cover 88% for
    three models, 94% for six and 95% for twenty; for two without a term, and no `difficulty` given,
    74%. A model's figure depends a little on which others are fitted with it. The priors' own
    variance is in it, a trace of
    width even for the baseline against itself. With no more instructions than coefficients the
    interval is [0, 1].

    Where all length differences are the same, φ_m is 0 and nothing is corrected. Where they vary
    but lie far on one side of zero, the win rate at equal lengths is an extrapolation; the width of
    the interval says so.

    Args:
        preferences: probabilities in [0, 1] that the model's answer is preferred, a tie 0.5, shape
            (models, instructions) or (models, instructions, pairs); NaN where not judged.
        lengths: of the models' answers, in any unit, same shape; not read where not judged.
        baseline_lengths: of the baseline's answers, shape (instructions,) or any that broadcasts to
            the shape of `preferences`.
        difficulty: γ, shape (instructions,), such as an earlier fit's; its scale and origin do not
            matter. None fits it, given three models or more, and else leaves the term out.

    Raises ValueError for other shapes, a preference outside [0, 1], a negative or non-finite length
    of a judged pair, a non-finite difficulty, or a model without a judged pair.
    """
    judged = _judgements(preferences, lengths, baseline_lengths)
    if difficulty is None:
        gamma = _standardised(_fit_difficulty(judged), judged.instructions)
    else:
        gamma = np.array(difficulty, dtype=np.float64)
        if gamma.shape != judged.instructions.shape or not np.all(np.isfinite(gamma)):
            raise ValueError(
                f"difficulty must be {judged.instructions.size} finite numbers, one an instruction"
            )
    column = _standardised(gamma, judged.instructions)
    effects = _shared(_length_effects(judged, column), judged.length_varies)
    win_rates = _win_rates(judged, column, effects)
    return LengthControlled(win_rates, tuple(effects.values.tolist()), gamma)


# --- the judged pairs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judgements:
    """Arrays of shape (models, instructions, pairs); pairs without a judgement have weight 0."""

    labels: Floats
    weights: Floats
    tanh: Floats  # of the standardised length differences

    @property
    def instructions(self) -> np.ndarray:
        """The mask of instructions judged for any model, shape (instructions,)."""
        return np.asarray(self.weights.any(axis=(0, 2)))

    @property
    def length_varies(self) -> np.ndarray:
        """The mask of models with a length term, shape (models,)."""
        return np.asarray(self.tanh.any(axis=(1, 2)))

    def flat(self, array: Floats) -> Floats:
        """Broadcast to the labels' shape and flatten to rows: (models, instructions · pairs)."""
        return np.broadcast_to(array, self.labels.shape).reshape(len(self.labels), -1)

    def columns(self, *parts: Floats) -> Floats:
        """Stack an intercept and these parts, shape (models, instructions · pairs, 1 + parts)."""
        ones = np.ones_like(self.labels)
        return np.stack([self.flat(part) for part in (ones, *parts)], axis=2)

    def by_instruction(self, rows: Floats) -> Floats:
        """Sum over pairs: (models, instructions · pairs, p) to (models, instructions, p)."""
        return np.asarray(rows.reshape(*self.labels.shape, -1).sum(axis=2))


def _judgements(
    preferences: ArrayLike, lengths: ArrayLike, baseline_lengths: ArrayLike
) -> _Judgements:
    labels = np.asarray(preferences, dtype=np.float64)
    ours = np.asarray(lengths, dtype=np.float64)
    theirs = np.asarray(baseline_lengths, dtype=np.float64)
    if labels.ndim not in (2, 3) or ours.shape != labels.shape:
        raise ValueError(
            "preferences and lengths must have one shape, (models, instructions) or (models, "
            f"instructions, pairs), got {labels.shape} and {ours.shape}"
        )
    if labels.ndim == 2:
        labels, ours = labels[:, :, None], ours[:, :, None]
        theirs = theirs[..., None]
    elif theirs.ndim == 1:
        theirs = theirs[:, None]
    theirs = np.broadcast_to(theirs, labels.shape)  # a ValueError where it does not fit
    judged = ~np.isnan(labels)
    _check(labels[judged], np.concatenate([ours[judged], theirs[judged]]))
    if not judged.any(axis=(1, 2)).all():
        raise ValueError("each model needs a judged pair")
    tanh = np.zeros(labels.shape)
    for m, pairs in enumerate(judged):
        tanh[m, pairs] = _tanh_difference(ours[m, pairs] - theirs[m, pairs])
    return _Judgements(np.where(judged, labels, 0.0), _weights(judged), tanh)


def _check(preferences: Floats, lengths: Floats) -> None:
    if not np.all((preferences >= 0) & (preferences <= 1)):
        raise ValueError("preferences must lie in [0, 1], or be NaN where not judged")
    if not np.all((lengths >= 0) & np.isfinite(lengths)):
        raise ValueError("the lengths of a judged pair must be finite and >= 0")


def _tanh_difference(differences: Floats) -> Floats:
    """Compute tanh(difference / s), 0 where the differences are all the same up to rounding."""
    if np.ptp(differences) <= 1e-9 * np.abs(differences).max():
        return np.zeros_like(differences)
    return np.tanh(differences / differences.std(ddof=1))


def _weights(judged: np.ndarray) -> Floats:
    """Return weights: equal for a model's instructions, 1 on average over its judged pairs."""
    pairs = judged.sum(axis=2, keepdims=True)
    average = pairs.sum(axis=1, keepdims=True) / (pairs > 0).sum(axis=1, keepdims=True)
    return np.where(judged, average / np.maximum(pairs, 1), 0.0)


# --- logistic regression --------------------------------------------------------------------------


# Not by scipy: its Newton-CG solves one regression at a time, and a joint fit with the difficulties
# moves published win rates in the fifth digit where prompts are few.
def _fit(
    columns: Floats,
    labels: Floats,
    weights: Floats,
    offset: Floats,
    ridge: float,
    start: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Fit many ridge-penalised logistic regressions at once, by Newton's method.

    Minimises Σ_r w (ln(1 + e^η) − label·η) + ridge/2 · ‖b‖², η = offset + columns · b.

    Args:
        columns: shape (fits, rows, p); labels, weights, offset: shape (fits, rows).

    Returns coefficients (fits, p) and the Hessians (fits, p, p) there, the ridge included.
    """

    def loss(b: Floats) -> Floats:
        eta = offset + np.einsum("frp,fp->fr", columns, b)
        data = np.sum(weights * (np.logaddexp(0, eta) - labels * eta), axis=1)
        return np.asarray(data + ridge / 2 * np.sum(b**2, axis=1))

    b = np.zeros((columns.shape[0], columns.shape[2])) if start is None else start
    for _ in range(100):
        gradient, hessian = _derivatives(columns, labels, weights, offset, b)
        gradient = gradient.sum(axis=1) + ridge * b
        hessian += ridge * np.eye(b.shape[1])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        if np.all(np.sum(gradient * step, axis=1) < 1e-20):
            break
        before, scale = loss(b), np.ones((len(b), 1))
        for _ in range(30):  # halve the steps that do not descend
            worse = loss(b - scale * step) > before + 1e-12 * np.abs(before)
            if not worse.any():
                break
            scale[worse] /= 2
        b = b - scale * step
    return b, hessian


def _derivatives(
    columns: Floats, labels: Floats, weights: Floats, offset: Floats, b: Floats
) -> tuple[Floats, Floats]:
    """Compute the loss's gradient by row (fits, rows, p) and its Hessian (fits, p, p)."""
    p = expit(offset + np.einsum("frp,fp->fr", columns, b))
    gradient = (weights * (p - labels))[..., None] * columns
    curvature = (weights * p * (1 - p))[..., None] * columns
    return gradient, np.swapaxes(curvature, 1, 2) @ columns


# --- the instructions' difficulty -----------------------------------------------------------------


def _fit_difficulty(judged: _Judgements) -> Floats:
    """Fit γ for ψ = 1, shape (instructions,); 0 where fewer than three models' preferences vary."""
    labels, weights, tanh = judged.labels, judged.weights, judged.tanh
    varies = np.array([np.ptp(y[w > 0]) > 0 for y, w in zip(labels, weights, strict=True)])
    gamma = np.zeros(labels.shape[1])
    if varies.sum() < 3:
        return gamma
    weights = weights * varies[:, None, None]
    columns, y, w = judged.columns(tanh), judged.flat(labels), judged.flat(weights)
    new, b = gamma, None
    for _ in range(1000):
        b, _ = _fit(columns, y, w, judged.flat(gamma[:, None]), RIDGE, b)
        new = _instruction_effects(labels, weights, b[:, :1, None] + b[:, 1:, None] * tanh, new)
        centred = new - new[judged.instructions].mean()  # the level is the models' θ
        change, gamma = np.abs(centred - gamma).max(), centred
        if change < 1e-9:
            break
    return gamma


def _instruction_effects(labels: Floats, weights: Floats, offset: Floats, start: Floats) -> Floats:
    """Fit the γ_i for known models, each with a standard normal prior, shape (instructions,)."""
    y, w, o = (np.swapaxes(a, 0, 1).reshape(a.shape[1], -1) for a in (labels, weights, offset))
    gamma, _ = _fit(np.ones_like(y)[..., None], y, w, o, 1.0, start[:, None])
    return gamma[:, 0]


def _standardised(gamma: Floats, judged: np.ndarray) -> Floats:
    """Scale to mean 0 and standard deviation 1 over judged instructions; 0 if constant."""
    values = gamma[judged]
    if values.std() <= 1e-9 * np.abs(values).max():
        return np.zeros_like(gamma)
    return np.where(judged, (gamma - values.mean()) / values.std(), 0.0)


# --- length effects -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LengthEffects:
    """The effects φ, shape (models,), and each instruction's influence, (models, instructions)."""

    values: Floats
    influence: Floats
    prior_variance: Floats  # what the priors add to the influence's sum of squares, (models,)

    @property
    def variance(self) -> Floats:
        return np.asarray(np.sum(self.influence**2, axis=1) + self.prior_variance)


def _length_effects(judged: _Judgements, gamma: Floats) -> _LengthEffects:
    """Fit φ of each model by itself."""
    columns = judged.columns(judged.tanh, gamma[:, None])
    y, w = judged.flat(judged.labels), judged.flat(judged.weights)
    b, hessian = _fit(columns, y, w, np.zeros_like(y), RIDGE)
    inverse = np.linalg.inv(hessian)
    scores, _ = _derivatives(columns, y, w, np.zeros_like(y), b)
    influence = -np.einsum("mp,mip->mi", inverse[:, 1], judged.by_instruction(scores))
    # The ridge is a prior worth RIDGE of information: it varies as much as such data would.
    prior = RIDGE * np.sum(inverse[:, 1] ** 2, axis=1)
    return _LengthEffects(b[:, 1], influence, prior)


def _shared(effects: _LengthEffects, varies: np.ndarray) -> _LengthEffects:
    """Shrink each φ towards the mean of the fitted ones; unchanged for fewer than four.

    φ̃ = (1 − B) φ + B φ̄ with B = (k−3)/(k−1) · v/(v + τ²), where v is the variance of φ, τ² that
    of the true effects among the k models, and φ̄ the mean weighted by 1/(v + τ²). For equal v this
    is the (positive-part) James-Stein estimator, which needs k ≥ 4 to gain anything. What φ̃ misses
    because its model is unlike the others has variance B² τ².
    """
    k = int(varies.sum())
    if k < 4:
        return effects
    phi, v = effects.values[varies], effects.variance[varies]
    w = 1 / v
    q = np.sum(w * (phi - np.sum(w * phi) / w.sum()) ** 2)
    tau2 = max(0.0, (q - (k - 1)) / (w.sum() - np.sum(w**2) / w.sum()))
    b = (k - 3) / (k - 1) * v / (v + tau2)
    w = 1 / (v + tau2)
    mixing = np.diag(1 - b) + np.outer(b, w / w.sum())
    values, influence, prior = (np.zeros_like(a) for a in vars(effects).values())
    values[varies] = mixing @ phi
    influence[varies] = mixing @ effects.influence[varies]
    prior[varies] = mixing**2 @ effects.prior_variance[varies] + b**2 * tau2
    return _LengthEffects(values, influence, prior)


# --- win rates ------------------------------------------------------------------------------------


def _win_rates(judged: _Judgements, gamma: Floats, effects: _LengthEffects) -> tuple[Figure, ...]:
    """Compute mean_i σ(θ + ψ γ_i), θ and ψ fitted for the given φ, with its intervals."""
    y, w = judged.flat(judged.labels), judged.flat(judged.weights)
    columns = judged.columns(judged.tanh, gamma[:, None])
    offset = effects.values[:, None] * columns[..., 1]
    b, hessian = _fit(columns[..., ::2], y, w, offset, RIDGE)
    at = np.stack([np.ones_like(gamma), gamma], axis=1)[judged.instructions]
    p = expit(b @ at.T)
    value = p.mean(axis=1)
    slope = (p * (1 - p)) @ at / len(at)  # along (θ, ψ)
    # What a unit of score of (θ, ψ) does to the win rate, and what a unit of φ does through them.
    answer = np.linalg.solve(hessian, slope[..., None])[..., 0]
    scores, information = _derivatives(
        columns, y, w, np.zeros_like(y), np.insert(b, 1, effects.values, axis=1)
    )
    by_phi = -np.einsum("mp,mp->m", answer, information[:, ::2, 1])
    scores = judged.by_instruction(scores)[..., ::2]
    influence = by_phi[:, None] * effects.influence - np.einsum("mp,mip->mi", answer, scores)
    influence[:, judged.instructions] += (p - value[:, None]) / len(at)
    units = judged.weights.any(axis=2).sum(axis=1)
    free = units - (1 + judged.length_varies + gamma.any())
    variance = np.sum(influence**2, axis=1) * units / np.maximum(free, 1)
    variance += by_phi**2 * effects.prior_variance + RIDGE * np.sum(answer**2, axis=1)
    return tuple(map(_interval, value, np.sqrt(variance), free))


def _interval(value: float, error: float, free: int) -> Figure:
    """Compute Student's interval on the logit scale."""
    if free < 1:
        return Figure(float(value), 0.0, 1.0)
    margin = stdtrit(free, 0.975) * error / (value * (1 - value))
    low, high = expit(logit(value) + np.array([-margin, margin]))
    return Figure(float(value), float(low), float(high))
