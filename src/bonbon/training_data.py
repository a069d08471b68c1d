"""Which groups can be trained on, and what they say of how they were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.objectives import OBJECTIVES
from bonbon.selection import Select, Selection, select_groups
from bonbon.trainer_config import BoNBoNConfig


def drawn_with(dataset: Any) -> Mapping[str, Any]:
    """The sampling settings that groups were drawn with; empty where they do not say."""
    settings: Mapping[str, Any] = getattr(dataset, "provenance", {}).get("sampling", {})
    return settings


def temperature_of(args: BoNBoNConfig, dataset: Any) -> float:
    """The temperature of the groups' log-probabilities, which the policy's must share."""
    drawn = drawn_with(dataset)
    if (drawn.get("top_k", 0) or drawn.get("top_p", 1) < 1) and OBJECTIVES[args.objective].compares:
        raise BonbonError(
            "the groups were drawn with top-k or top-p, so their log-probabilities are those of a "
            f"cut distribution that the policy does not have; objective {args.objective} compares "
            "the two: draw without, or train with objective sft_bon or weighted_sft"
        )
    asked, found = args.temperature, drawn.get("temperature")
    if asked is not None and found is not None and asked != found:
        raise BonbonError(
            f"the groups were drawn at temperature {found}, not {asked}; leave it out"
        )
    return float(next((t for t in (asked, found) if t is not None), 1.0))


def selected(dataset: Any, choice: Select) -> Selection | None:
    if dataset is None:
        return None
    groups = [row if isinstance(row, Group) else Group.from_row(row) for row in dataset]
    for group in groups:
        if any(-1 in ids for ids in group.token_ids):
            raise BonbonError(
                f"the completions of prompt {group.prompt_id} have texts but no tokens, as a "
                "server gave them; draw them with a sampler of `bonbon sample`"
            )
    return select_groups(groups, choice)


def check_logprobs(*selections: Selection | None) -> None:
    """Raise BonbonError for groups whose log-probabilities are not known."""
    groups = [group for selection in selections if selection for group in selection.groups]
    unknown = [group.prompt_id for group in groups if not np.isfinite(group.ref_logps).all()]
    if unknown:
        raise BonbonError(
            f"the groups of {len(unknown)} prompts ({unknown[0]}, …) have no log-probabilities; "
            "set logprobs to recompute"
        )


def common_n(*selections: Selection | None) -> int | None:
    found = {selection.n for selection in selections if selection is not None}
    if len(found) > 1:
        raise BonbonError(
            f"the training and the evaluation groups differ in n: {sorted(found)}; draw as many "
            "completions for both"
        )
    return next(iter(found), None)
