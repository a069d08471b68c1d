"""The prompts of a run: those to train on, and those held out for the evaluation."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from bonbon.config.run import RunConfig
from bonbon.config.sampling import (
    PromptsConfig,
)
from bonbon.groups.prompts import PromptRow, is_held_out, iter_prompts
from bonbon.system.errors import BonbonError


def evaluation_prompts(config: RunConfig) -> list[PromptRow]:
    """The prompts to evaluate on. Raises BonbonError as `iter_prompts` does."""
    if config.evaluation.prompts is not None:
        return read_configured(config.evaluation.prompts)
    return [row for row, is_held in _divided(config) if is_held]


def training_prompts(config: RunConfig) -> Iterator[PromptRow]:
    """The prompts to train on, one in memory at a time. Raises BonbonError as `iter_prompts`."""
    if config.evaluation.prompts is not None:
        yield from _rows(config.prompts)
    else:
        yield from (row for row, is_held in _divided(config) if not is_held)


def _divided(config: RunConfig) -> Iterator[tuple[PromptRow, bool]]:
    """All prompts, each with whether it is held out for the evaluation."""
    counts = {True: 0, False: 0}
    for row in _rows(config.prompts):
        is_held = is_held_out(row, config.evaluation.holdout)
        counts[is_held] += 1
        yield row, is_held
    if 0 in counts.values():
        raise BonbonError(
            f"{config.prompts.path}: {sum(counts.values())} prompts are too few to hold out "
            f"{config.evaluation.holdout:.0%} for the evaluation; set evaluation.prompts"
        )


def trained_on(config: RunConfig, among: Collection[str]) -> set[str]:
    """Those of some prompts, each as JSON, that the training prompts have too."""
    told = (json.dumps(row.prompt) for row in training_prompts(config))
    return {prompt for prompt in told if prompt in among}


def read_configured(prompts: PromptsConfig) -> list[PromptRow]:
    """The prompts of a configured file. Raises BonbonError as `iter_prompts` does."""
    return list(_rows(prompts))


def _rows(prompts: PromptsConfig) -> Iterator[PromptRow]:
    return iter_prompts(
        prompts.path, prompts.column, prompts.id_column, prompts.split, prompts.limit
    )
