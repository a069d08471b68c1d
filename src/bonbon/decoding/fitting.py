"""Choice of β on a development set.

The set is groups with the rewards that a strategy chooses by, and a gold value of each completion
that measures how good the choice was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from pydantic import ValidationError

from bonbon.config.settings import parse_overrides
from bonbon.decoding.catalogue import parse_strategy, strategy_class
from bonbon.decoding.regularised import Regularised
from bonbon.decoding.strategy import Floats, Source, WholeDraws
from bonbon.evaluation.figures import Figure, bootstrap
from bonbon.groups.group import Group
from bonbon.groups.provenance import check_independent
from bonbon.groups.shards import read_groups
from bonbon.system.errors import BonbonError

# Five values a decade, relative to the β at which reward and regularisation weigh the same.
_GRID = np.geomspace(1e-4, 1e1, 26)


@dataclass(frozen=True)
class BetaPoint:
    """The expected gold value of a strategy's answers at one β, averaged over prompts."""

    beta: float
    gold: Figure


@dataclass(frozen=True)
class FittedBeta:
    """The β with the largest mean gold value, of tied ones the smallest.

    `curve` has all tried values, ascending. `at_edge`: the best is the last value of the grid, or
    the first if smaller ones are allowed, so a wider grid may have a better one.
    """

    beta: float
    curve: tuple[BetaPoint, ...]
    at_edge: bool
    field: str = "beta"


def fit_beta(
    strategy: WholeDraws,
    groups: Sequence[Group],
    gold: str,
    betas: Sequence[float] | None = None,
    source: Source | None = None,
    field: str = "beta",
) -> FittedBeta:
    """Return the best β of a grid for a strategy; its other settings stay fixed.

    The strategy's distribution over the candidates of a group is known, so the expected gold value
    is exact given the candidates. The interval is over prompts (bootstrap).

    Args:
        strategy: a strategy of whole draws that has the setting `field`.
        groups: scored groups, drawn with the settings that the strategy will be used with.
        gold: the groups' metric with the gold values.
        betas: the grid; None: 26 values from 1e-4 to 10 times the ratio of two spreads within
            prompts, that of the rewards over that of the penalties, and 0 if it is allowed.
        source: embeds completions, for distances of embeddings.
        field: the setting to fit, such as `tau` for `SoftBestOfN`.

    Raises BonbonError for groups without rewards or gold values, ValueError for a setting that the
    strategy does not have or a value that it does not allow.
    """
    if field not in type(strategy).model_fields:
        raise ValueError(f"{type(strategy).__name__} has no setting {field!r}")
    if not groups:
        raise BonbonError("no groups to fit on; sample and score some prompts first")
    values = [_gold_values(group, gold) for group in groups]
    known = [_known(strategy, group, source) for group in groups]
    grid = _default_grid(strategy, groups, known, field) if betas is None else sorted({*betas})
    if not len(grid):
        raise ValueError("betas is empty")
    curve = []
    for beta in grid:
        tried = _with(strategy, field, float(beta))
        expected = [
            float(_weights(tried, group, known_here, source) @ gold_here)
            for group, known_here, gold_here in zip(groups, known, values, strict=True)
        ]
        curve.append(BetaPoint(float(beta), bootstrap([np.array(expected)], lambda mean: mean)))
    best = int(np.argmax([point.gold.value for point in curve]))
    at_edge = best == len(curve) - 1 or (best == 0 and curve[0].beta > 0)
    return FittedBeta(curve[best].beta, tuple(curve), at_edge, field)


def _gold_values(group: Group, gold: str) -> Floats:
    if group.rewards is None:
        raise BonbonError(f"prompt {group.prompt_id} has no rewards; score the groups first")
    if "rejected" in group.finish_reasons or not np.isfinite(group.rewards).all():
        raise BonbonError(
            f"prompt {group.prompt_id} has rejected completions, or rewards that are not finite; "
            "fit on whole, scored draws"
        )
    if gold not in group.metrics:
        has = ", ".join(group.metrics) or "none"
        raise BonbonError(f"prompt {group.prompt_id} has no metric {gold!r} (it has {has})")
    values = np.asarray(group.metrics[gold], dtype=np.float64)
    for k in np.flatnonzero(~np.isfinite(values)):
        raise BonbonError(
            f"prompt {group.prompt_id}, completion {k + 1}: the metric {gold!r} is {values[k]}; "
            "leave the prompt out or measure it again"
        )
    return values


def _known(strategy: WholeDraws, group: Group, source: Source | None) -> Floats | None:
    return strategy.known(group, source) if isinstance(strategy, Regularised) else None


def _weights(
    strategy: WholeDraws, group: Group, known: Floats | None, source: Source | None
) -> Floats:
    if isinstance(strategy, Regularised) and known is not None:
        return strategy.weigh(group, known)
    return strategy.weights(group, cast(Source, source))  # those without `known` need no source


def _with(strategy: WholeDraws, field: str, value: float) -> WholeDraws:
    return type(strategy).model_validate({**strategy.model_dump(), field: value})


def _default_grid(
    strategy: WholeDraws, groups: Sequence[Group], known: Sequence[Floats | None], field: str
) -> list[float]:
    rewards = _spread([np.asarray(group.rewards) for group in groups])
    against = _spread([values for values in known if values is not None])
    grid = [float(beta) for beta in _GRID * (rewards / against)]
    try:
        _with(strategy, field, 0.0)
    except ValidationError:
        return grid
    return [0.0, *grid]


def _spread(per_prompt: Sequence[Floats]) -> float:
    """Return the mean standard deviation within prompts; 1 if nothing varies."""
    mean = float(np.mean([values.std() for values in per_prompt])) if per_prompt else 0.0
    return mean if mean > 0 else 1.0


def fit_on_folder(
    folder: Path, name: str, changes: Sequence[str], gold: str, field: str | None, model: str | None
) -> FittedBeta:
    """Run `fit_beta` for a named strategy on a folder of groups; `changes` are `setting=value`.

    `field` None fits the strategy's β, or its τ if it has no β.

    Raises BonbonError when something cannot be fitted, read or loaded.
    """
    settings = parse_overrides(changes)
    try:
        fields = strategy_class(name).model_fields
        field = field or ("tau" if "beta" not in fields and "tau" in fields else "beta")
        for key in sorted(settings.keys() & {"name", field}):
            raise BonbonError(f"--set {key}: leave it out; it is fitted, or set by --strategy")
        settings |= {"name": name, field: 1.0}
        strategy = parse_strategy(settings)
    except ValueError as error:
        raise BonbonError(str(error)) from error
    if not isinstance(strategy, WholeDraws) or field not in type(strategy).model_fields:
        raise BonbonError(f"strategy {name} has no setting {field!r} that could be fitted")
    groups = read_groups(folder)
    check_independent(groups.provenance, "fit on")
    source = None if model is None else _source(model)
    return fit_beta(strategy, groups, gold, source=source, field=field)


def _source(model: str) -> Source:
    from bonbon.config.sampling import SamplingConfig
    from bonbon.decoding.source import LocalSource
    from bonbon.models.loading import load_policy

    return LocalSource(*load_policy(model), SamplingConfig())
