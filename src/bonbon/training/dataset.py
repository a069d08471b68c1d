"""Which groups can be trained on, and what they say of how they were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.groups.group import Group
from bonbon.groups.provenance import drawn_with
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.objectives.selection import Select, SelectedGroup, checked_rewards
from bonbon.system.errors import BonbonError
from bonbon.system.processes import from_machine, wait_for_everyone
from bonbon.system.storage import beside
from bonbon.training.arguments import BoNBoNConfig
from bonbon.training.dataset_file import SelectedGroups, write_selected


class Chosen(Iterable[SelectedGroup]):
    """What a choice takes of groups, one by one; those that tie are passed over, and counted.

    Iterating raises BonbonError when groups differ in n (the target depends on it), when one is
    unscored, has a reward that is not finite or fewer than two completions, and at the end when
    there were no groups or every one ties.

    Attributes:
        n: the completions of each group that was seen, 0 before.
        tied: how many of them were passed over.
    """

    def __init__(self, groups: Iterable[Group], select: Select) -> None:
        self._groups = groups
        self._select = select
        self.n = 0
        self.tied = 0

    def __iter__(self) -> Iterator[SelectedGroup]:
        self.n = self.tied = kept = 0
        for group in self._groups:
            self.n = self.n or group.n
            if group.n != self.n:
                raise BonbonError(
                    f"group {group.prompt_id} has {group.n} completions, others have {self.n}; "
                    "train on groups of one size"
                )
            indices = self._select(group)
            if indices is None:
                self.tied += 1
            else:
                kept += 1
                yield _selected(group, indices)
        if not kept and not self.tied:
            raise BonbonError("there are no groups to train on")
        if not kept:
            raise BonbonError(
                f"in all {self.tied} groups the best and the worst reward tie: the reward tells no "
                "completion from another, so there is nothing to learn"
            )


def _selected(group: Group, indices: Sequence[int]) -> SelectedGroup:
    rewards = checked_rewards(group)
    return SelectedGroup(
        prompt_id=group.prompt_id,
        prompt_token_ids=group.prompt_token_ids,
        completions=tuple(group.token_ids[index] for index in indices),
        ref_logps=tuple(group.logprobs[index] for index in indices),
        rewards=tuple(rewards[index] for index in indices),
    )


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
