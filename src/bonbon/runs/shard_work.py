"""Work on shards: the prompts of a run as shards, and stages that transform them one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bonbon.groups.group import Group, Groups
from bonbon.groups.prompts import EncodedPrompt
from bonbon.groups.shards import (
    iter_provenance,
    read_shard,
    shard_indices,
    shard_path,
    shard_rows,
    write_shard,
)
from bonbon.system.prefetch import in_turn
from bonbon.system.progress import progress_bar
from bonbon.system.storage import remove_file

# --- working through shards -----------------------------------------------------------------------

Progress = Callable[[int], Any]  # called with the number of tokens that were drawn


Transform = Callable[[Sequence[Group], Progress], list[Group]]


@dataclass(frozen=True)
class ShardWork:
    """A stage's work on shards: the groups of `source`, transformed, into `target`.

    Whoever calls it, in whichever process and order: a shard's output depends on the shard alone.
    `provenance` is what `target` notes beside what `source` does.
    """

    source: Path
    target: Path
    transform: Transform
    provenance: Mapping[str, Any]

    def todo(self) -> list[int]:
        """The shards that `source` has and `target` lacks."""
        done = set(shard_indices(self.target))
        return [index for index in shard_indices(self.source) if index not in done]

    def read(self, index: int) -> Groups:
        """A shard of `source`."""
        return read_shard(shard_path(self.source, index))

    def make(self, groups: Groups, progress: Progress = lambda _: None) -> Groups:
        """The groups transformed, with the tokens and the seconds noted."""
        began = time.monotonic()
        made = self.transform(groups, progress) if len(groups) else []
        spent = {
            "tokens": sum(sum(group.lengths()) for group in made),
            "seconds": time.monotonic() - began,
        }
        return Groups(made, groups.provenance | dict(self.provenance) | spent)

    def write(self, index: int, groups: Groups) -> None:
        """A shard of `target`, whole or not at all."""
        write_shard(shard_path(self.target, index), groups, groups.provenance)


def prompt_count(source: Path, todo: Sequence[int]) -> int:
    """The prompts of these shards, all of one size but the last.

    Two are opened and not all, which in a store would take longer than the first shard's work.
    """
    if not todo:
        return 0
    first, last = (shard_rows(shard_path(source, index)) for index in (todo[0], todo[-1]))
    return first * (len(todo) - 1) + last


def work_through(work: ShardWork, title: str) -> None:
    """Do what is left, shard by shard, under a progress bar."""
    todo = work.todo()
    if not todo:
        return
    with progress_bar(title, prompt_count(work.source, todo), "prompts") as bar:
        for index in todo:
            made = work.make(work.read(index), bar.tokens)
            work.write(index, made)
            bar.advance(len(made))


# --- sampling -------------------------------------------------------------------------------------


def write_prompts(prompts: Iterable[EncodedPrompt], folder: Path, size: int) -> int:
    """Prompts as groups that have no completions yet, `size` a shard; how many shards.

    The folder then holds these alone: what an earlier call left there is written over or removed.
    """
    upcoming = iter(prompts)
    chunks = iter(lambda: [prompt.as_group() for prompt in islice(upcoming, size)], [])

    def write(numbered: tuple[int, list[Group]]) -> None:
        index, groups = numbered
        write_shard(shard_path(folder, index), groups, {})

    count = sum(1 for _ in in_turn(write, enumerate(chunks)))
    for index in shard_indices(folder):
        if index >= count:
            remove_file(shard_path(folder, index))
    return count


def spent(folders: Iterable[Path]) -> dict[str, float | None]:
    """The `tokens` and `seconds` that folders' shards took; None where one does not say."""
    noted = [note for folder in folders for note in list(iter_provenance(folder)) or [{}]]
    return {what: _total([note.get(what) for note in noted]) for what in ("tokens", "seconds")}


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
