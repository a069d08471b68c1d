"""Which groups can be trained on, and what they say of how they were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.distributed import from_machine, wait_for_everyone
from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.objectives import OBJECTIVES
from bonbon.selected_groups import SelectedGroups, write_selected
from bonbon.selection import Chosen, Select
from bonbon.storage import beside
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


@dataclass(frozen=True)
class Selection:
    """What to train on, the n that each group holds, and how many groups tied and were left out."""

    groups: SelectedGroups
    n: int
    tied: int

    @property
    def found(self) -> int:
        """How many groups there were to select from."""
        return len(self.groups) + self.tied


def selected(dataset: Any, choice: Select, folder: Path) -> Selection | None:
    """What a choice takes of a data set, read once on each machine; None for no data set.

    It goes through a file in `folder` that the processes of a machine map. The file is then
    removed, and what is mapped stays until they end.
    """
    if dataset is None:
        return None
    path, n, tied = from_machine(lambda: _select(dataset, choice, folder))
    groups = SelectedGroups(path)
    wait_for_everyone()
    path.unlink(missing_ok=True)  # by whichever process comes first
    return Selection(groups, n, tied)


def _select(dataset: Iterable[Any], choice: Select, folder: Path) -> tuple[Path, int, int]:
    """A new file with what is selected, and what `Selection` knows of it."""
    path = beside(folder / "selected.arrow")
    chosen = Chosen(_trainable(dataset), choice)
    try:
        write_selected(chosen, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, chosen.n, chosen.tied


def _trainable(dataset: Iterable[Any]) -> Iterator[Group]:
    for row in dataset:
        group = row if isinstance(row, Group) else Group.from_row(row)
        if any(-1 in ids for ids in group.token_ids):
            raise BonbonError(
                f"the completions of prompt {group.prompt_id} have texts but no tokens, as a "
                "server gave them; draw them with a sampler of `bonbon sample`"
            )
        yield group


def check_logprobs(*selections: Selection | None) -> None:
    """Raise BonbonError for groups whose log-probabilities are not known."""
    for groups in (selection.groups for selection in selections if selection):
        unknown = np.flatnonzero(~np.isfinite(groups.ref_logps).all(axis=1)).tolist()
        if unknown:
            raise BonbonError(
                f"the groups of {len(unknown)} prompts ({groups[unknown[0]].prompt_id}, …) have no "
                "log-probabilities; set logprobs to recompute"
            )


def common_n(*selections: Selection | None) -> int | None:
    found = {selection.n for selection in selections if selection is not None}
    if len(found) > 1:
        raise BonbonError(
            f"the training and the evaluation groups differ in n: {sorted(found)}; draw as many "
            "completions for both"
        )
    return next(iter(found), None)
