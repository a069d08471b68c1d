"""Off-target drift: what changed in a model besides the reward.

The BoNBoN paper (Gui, Gârbacea, Veitch 2024, arXiv 2406.00832) holds a method's win rate against
how far it moves what the reward never asked for, such as length. Metrics here are figures of
completions, or of all completions of a prompt together; a drift is a metric's mean under the model
less its mean under the base model, over the same prompts. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.diversity import distinct, repetition, self_bleu
from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.evaluation.refusals import is_refusal
from bonbon.groups.group import Group

# --- metrics --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletionMetric:
    """A metric of single completions: `function` computes a group's values, shape (n,).

    `name` is its key in `evaluation.json`, `label` its words in tables; `unit` may be empty.
    """

    name: str
    label: str
    unit: str
    function: Callable[[Group], ArrayLike]

    def per_prompt(self, groups: Sequence[Group], k: int) -> Floats:
        """Compute the mean over each prompt's first k completions, shape (prompts,).

        Raises ValueError where a group has fewer.
        """
        _check_size(groups, k)
        values = [np.asarray(self.function(group), dtype=np.float64)[:k] for group in groups]
        return np.array([row.mean() for row in values])


@dataclass(frozen=True)
class GroupMetric:
    """A metric of a prompt's completions together, from their texts; it needs `fewest` of them.

    Such figures depend on how many completions there are: compare models at one k only.
    """

    name: str
    label: str
    unit: str
    function: Callable[[Sequence[str]], float]
    fewest: int = 1

    def per_prompt(self, groups: Sequence[Group], k: int) -> Floats:
        """Compute the metric of each prompt's first k completions, shape (prompts,).

        Raises ValueError where a group has fewer, or where the metric needs more than k.
        """
        _check_size(groups, k)
        if k < self.fewest:
            raise ValueError(f"{self.name} needs {self.fewest} completions a prompt, got k = {k}")
        return np.array([self.function(group.completions[:k]) for group in groups])


Metric = CompletionMetric | GroupMetric


def _check_size(groups: Sequence[Group], k: int) -> None:
    for group in groups:
        if not 1 <= k <= group.n:
            raise ValueError(f"group {group.prompt_id} has {group.n} completions, not k = {k}")


def _of_texts(function: Callable[[str], float]) -> Callable[[Group], Floats]:
    return lambda group: np.array([function(text) for text in group.completions], np.float64)


def _truncations(group: Group) -> Floats:
    return np.array([reason == "length" for reason in group.finish_reasons], np.float64)


COMPLETION_METRICS = {
    metric.name: metric
    for metric in (
        CompletionMetric("length", "length", "tokens", Group.lengths),
        CompletionMetric("characters", "length in characters", "characters", _of_texts(len)),
        CompletionMetric("repetition", "repeated 4-grams", "share", _of_texts(repetition)),
        CompletionMetric("refusal", "refusals", "share", _of_texts(is_refusal)),
        CompletionMetric("truncation", "cut off at the limit", "share", _truncations),
        CompletionMetric(
            "empty", "blank completions", "share", _of_texts(lambda text: not text.strip())
        ),
    )
}


GROUP_METRICS = {
    metric.name: metric
    for metric in (
        GroupMetric("distinct_1", "distinct words", "share", lambda texts: distinct(texts, 1)),
        GroupMetric("distinct_2", "distinct bigrams", "share", lambda texts: distinct(texts, 2)),
        GroupMetric("self_bleu", "self-BLEU", "", self_bleu, fewest=2),
    )
}


def metrics_for(k: int) -> dict[str, Metric]:
    """Return the metrics defined for k completions a prompt, by name: self-BLEU only for k ≥ 2."""
    groupwise = {name: it for name, it in GROUP_METRICS.items() if it.fewest <= k}
    return {**COMPLETION_METRICS, **groupwise}


# --- drift ----------------------------------------------------------------------------------------


def drift_from_base(ours: Floats, base: Floats, resamples: int = 2000) -> Figure:
    """Compute the mean over prompts of a metric's change from the base model, paired.

    Args:
        ours: the model's value of each prompt, shape (prompts,).
        base: the base model's, of the same prompts in the same order.
        resamples: of the bootstrap.

    Raises ValueError for unequal shapes, no prompts, or values that are not finite.
    """
    _check_paired(ours, base)
    return bootstrap((ours, base), lambda our, base: our - base, resamples)


# Far below the gain of any model that wins significantly.
_LEAST_GAIN = 1e-12


def drift_at_equal_win_rate(
    ours: Floats, base: Floats, wins: Floats, target_win_rate: float, resamples: int = 2000
) -> Figure | None:
    """Compute the drift of the mixture of model and base that has win rate `target_win_rate`.

    A model that wins more drifts more, so models are compared where they win alike. To answer with
    the model with probability λ, else with the base model, wins ½ + λ(win − ½) and has exactly λ
    times the drift of any mean over completions; so the figure is drift · (target − ½)/(win − ½), a
    statistic of means over prompts. Figures of a prompt's completions together (distinct n-grams,
    self-BLEU) are not linear in λ: of them it is a linear interpolation.

    Args:
        ours, base: as for `drift_from_base`.
        wins: the model's win rate against the base model on each prompt, shape (prompts,).
        target_win_rate: taken as given; its own sampling error is not in the interval.

    Returns None where no mixture wins so often (target under ½ or over the model's win rate), and
    where the win rate's 95% interval reaches down to ½: the ratio's would have no end.
    Raises ValueError as `drift_from_base` does.
    """
    _check_paired(ours, base, wins)
    win = bootstrap((wins,), lambda mean: mean, resamples)
    # A target that is the model's own win rate, summed in another order, is within reach.
    if win.low <= 0.5 or not 0.5 <= target_win_rate <= win.value + 1e-9:
        return None

    def at_target(our: ArrayLike, base: ArrayLike, win: ArrayLike) -> Floats:
        # Resamples without a gain, under 2.5% of them, belong at the interval's far end.
        gain = np.maximum(np.asarray(win) - 0.5, _LEAST_GAIN)
        return np.asarray((np.asarray(our) - base) * (target_win_rate - 0.5) / gain)

    return bootstrap((ours, base, wins), at_target, resamples)


def _check_paired(*per_prompt: Floats) -> None:
    shapes = {np.shape(values) for values in per_prompt}
    if len(shapes) > 1 or np.ndim(per_prompt[0]) != 1 or not np.size(per_prompt[0]):
        raise ValueError(f"values per prompt must be vectors of one length >= 1, got {shapes}")
    if not all(np.all(np.isfinite(values)) for values in per_prompt):
        raise ValueError("values per prompt must be finite")
