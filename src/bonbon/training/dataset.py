"""Selects what can be trained on from a data set, and reads how its groups were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.groups.group import Group
from bonbon.groups.provenance import drawn_with
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.objectives.selection import SelectedGroup, Selector, checked_rewards
from bonbon.system.errors import BonbonError
from bonbon.system.processes import from_machine, wait_for_everyone
from bonbon.system.storage import beside
from bonbon.training.arguments import BoNBoNConfig
from bonbon.training.dataset_file import SelectedGroups, write_selected


@dataclass
class _Counts:
    """Counts of a pass over groups: the completions of each (0 before the first), and the ties."""

    n: int = 0
    tied: int = 0


def select_groups(dataset: Any, selector: Selector, folder: Path) -> SelectedGroups | None:
    """Apply a selector to a data set's groups, once on each machine; None for no data set.

    The result goes through a file in `folder` that the processes of a machine map. The file is then
    removed; the mapping lasts as long as the processes.

    Raises BonbonError when groups differ in n (the target depends on it); when a group has no
    rewards, a reward that is not finite, fewer than two completions or completions without tokens;
    when there are no groups, and when all of them tie.
    """
    if dataset is None:
        return None
    path, counts = from_machine(lambda: _write_selected(dataset, selector, folder))
    groups = SelectedGroups(path, n=counts.n, tied=counts.tied)
    wait_for_everyone()
    path.unlink(missing_ok=True)  # by whichever process comes first
    return groups


def _write_selected(
    dataset: Iterable[Any], selector: Selector, folder: Path
) -> tuple[Path, _Counts]:
    """Write what a selector takes to a new file; the file is removed on an error."""
    path, counts = beside(folder / "selected.arrow"), _Counts()
    try:
        write_selected(_select_each(_trainable(dataset), selector, counts), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, counts


def _select_each(
    groups: Iterable[Group], selector: Selector, counts: _Counts
) -> Iterator[SelectedGroup]:
    """Yield what a selector takes of each group, and count the groups that it leaves out."""
    taken = 0
    for group in groups:
        counts.n = counts.n or group.n
        if group.n != counts.n:
            raise BonbonError(
                f"group {group.prompt_id} has {group.n} completions, others have {counts.n}; "
                "train on groups of one size"
            )
        indices = selector(group)
        if indices is None:
            counts.tied += 1
        else:
            taken += 1
            yield _selected_group(group, indices)
    if not taken and not counts.tied:
        raise BonbonError("there are no groups to train on; draw and score some first")
    if not taken:
        raise BonbonError(
            f"in all {counts.tied} groups the best and the worst reward tie, so there is no "
            "preference to learn; use a reward that differs between completions"
        )


def _selected_group(group: Group, indices: Sequence[int]) -> SelectedGroup:
    rewards = checked_rewards(group)
    return SelectedGroup(
        prompt_id=group.prompt_id,
        prompt_token_ids=group.prompt_token_ids,
        completions=tuple(group.token_ids[index] for index in indices),
        ref_logps=tuple(group.logprobs[index] for index in indices),
        rewards=tuple(rewards[index] for index in indices),
    )


def _trainable(dataset: Iterable[Any]) -> Iterator[Group]:
    """Yield a data set's groups. Raises BonbonError for one whose tokens are not known."""
    for row in dataset:
        group = row if isinstance(row, Group) else Group.from_row(row)
        if any(-1 in ids for ids in group.token_ids):
            raise BonbonError(
                f"the completions of prompt {group.prompt_id} have texts but no tokens, as they "
                "come from a server; draw them with a sampler of `bonbon sample`"
            )
        yield group


def temperature_of(args: BoNBoNConfig, dataset: Any) -> float:
    """Return the temperature of the groups' log-probabilities, for the policy's to have the same.

    Raises BonbonError where the groups were drawn at another temperature than `args` asks for, and
    where they were drawn with top-k or top-p and the objective compares log-probabilities.
    """
    drawn = drawn_with(dataset)
    if (drawn.get("top_k", 0) or drawn.get("top_p", 1) < 1) and OBJECTIVES[args.objective].compares:
        raise BonbonError(
            "the groups were drawn with top-k or top-p, so their log-probabilities are those of a "
            f"truncated distribution, which objective {args.objective} would compare with the "
            "policy's whole one; draw without them, or train with objective sft_bon or weighted_sft"
        )
    wanted, known = args.temperature, drawn.get("temperature")
    if wanted is not None and known is not None and wanted != known:
        raise BonbonError(
            f"the groups were drawn at temperature {known}, not {wanted}; leave temperature out"
        )
    return float(next((t for t in (wanted, known) if t is not None), 1.0))


def check_logprobs(*data_sets: SelectedGroups | None) -> None:
    """Raise BonbonError for groups whose log-probabilities are not known."""
    for groups in (groups for groups in data_sets if groups is not None):
        unknown = np.flatnonzero(~np.isfinite(groups.ref_logps).all(axis=1)).tolist()
        if unknown:
            raise BonbonError(
                f"the groups of {len(unknown)} prompts ({groups[unknown[0]].prompt_id}, …) have no "
                "log-probabilities; set logprobs to recompute"
            )


def common_n(*data_sets: SelectedGroups | None) -> int | None:
    """Return the n of the data sets; None for no data set. Raises BonbonError if they differ."""
    sizes = {groups.n for groups in data_sets if groups is not None}
    if len(sizes) > 1:
        raise BonbonError(
            f"the training and the evaluation groups differ in n: {sorted(sizes)}; draw as many "
            "completions for both"
        )
    return next(iter(sizes), None)
