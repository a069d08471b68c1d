"""Forget what was begun and came to nothing, so that it can be begun with other settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from bonbon.groups.shards import shard_paths
from bonbon.runs.notes import Notes
from bonbon.runs.paths import RunPaths
from bonbon.runs.stage import Stage
from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError
from bonbon.system.storage import remove_folder, storage_path


def forget_empty_stage(paths: RunPaths, stage: Stage, own: Notes, notes: Iterable[Notes]) -> None:
    """Drop the notes of a stage that has written no shard, where it was to write them.

    That place is `own` notes' `storage`. Where it is the one of now, all `notes` of it are dropped;
    else those of the run's folder alone, since the other place may be another run's.
    """
    noted = own.noted(stage.name)
    if noted is None:
        return
    place = noted.get("storage")
    data = paths.path if place is None else storage_path(place)
    if shard_paths(data / stage.output.name):
        return
    if place != paths.storage:
        own.forget(stage.name)
        return
    for each in notes:
        each.forget(stage.name)
        if stage.name == "sample":
            each.forget("prompts")
    if stage.name == "sample":
        remove_folder(paths.prompts)


def has_trained(paths: RunPaths, name: str) -> bool:
    """Return whether something came of the training of the model of that name."""
    return paths.model(name).exists() or last_checkpoint(paths, name) is not None


def forget_empty_training(paths: RunPaths, notes: Notes, name: str) -> None:
    """Drop the notes of a training that has neither a model nor a checkpoint."""
    if not has_trained(paths, name):
        notes.forget(paths.training(name))
        shutil.rmtree(paths.checkpoints(name), ignore_errors=True)


def last_checkpoint(paths: RunPaths, name: str) -> Path | None:
    """Find the newest whole checkpoint of a training; torn ones are removed."""
    whole = []
    for folder in paths.checkpoints(name).glob("checkpoint-*"):
        # The trainer's state is the last file that a checkpoint gets.
        try:
            read_json(folder / "trainer_state.json")
        except BonbonError:
            shutil.rmtree(folder)
            continue
        whole.append(folder)
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
