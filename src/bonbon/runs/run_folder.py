"""A run's folder: what was asked for, and what must not be mixed.

Each stage notes the settings its output depends on under `.bonbon/` before it starts. The same
command later finds the note, compares, and goes on; a command with other settings is refused with
the names of what differs. Settings that cannot change a result (batch sizes in tokens, devices) are
not compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bonbon.config.run import RunConfig, round_config
from bonbon.groups.shards import shard_indices, shard_paths
from bonbon.rewards.identity import same_value
from bonbon.runs.fingerprints import train_settings
from bonbon.runs.prompts import RunPrompts
from bonbon.runs.stage_folder import StageFolder
from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError
from bonbon.system.processes import from_main_process
from bonbon.system.storage import cannot_write, is_remote, reached, remove_folder, storage_path


class _Store(StageFolder):
    """A store of samples and groups apart from the run's folder, which keeps the configuration."""

    _option = "storage"

    def write_config(self) -> None:
        """The run's folder has it."""


class RunFolder(StageFolder):
    """The layout of a run's folder.

    `prompts/`, `samples/` and `groups/` hold the prompts, the drawn and the scored groups; they may
    lie in a store (`storage`) instead. `model/` and `baselines/NAME/` hold the trained models,
    `evaluation/` the evaluation, `.bonbon/` notes and training checkpoints.

    `rows` are the prompts that the configuration names; the rounds of a run share theirs.

    Raises BonbonError for a store that cannot be used.
    """

    def __init__(self, path: Path, config: RunConfig, rows: RunPrompts | None = None) -> None:
        super().__init__(path, config)
        self.config = config
        self.rows = rows or RunPrompts(config)
        self.data = path if config.storage is None else storage_path(config.storage)
        self.store = self if config.storage is None else _Store(self.data, config)
        self.prompts = self.data / "prompts"
        self.samples = self.data / "samples"
        self.groups = self.data / "groups"
        self.evaluation = path / "evaluation"

    def rounds(self) -> list[RunFolder]:
        """The folders of the rounds of sampling, scoring and training: this one where it is one."""
        if self.config.rounds == 1:
            return [self]
        base: Path | str = self.config.model.name
        folders: list[RunFolder] = []
        for number in range(1, self.config.rounds + 1):
            config = round_config(self.config, number, base)
            folders.append(RunFolder(self.path / f"round-{number}", config, self.rows))
            base = folders[-1].model(self.config.model_name)
        return folders

    def ways(self, stage: str) -> tuple[Path, Path]:
        """Return where the shards of the stage `sample` or `score` come from and go to."""
        if stage == "sample":
            return self.prompts, self.samples
        return self.samples, self.groups

    @contextmanager
    def data_locked(self) -> Iterator[None]:
        """Hold a storage folder too, while samples or groups are made; a store has no locks."""
        if self.store is self or is_remote(self.data):
            yield
            return
        with self.store.locked():
            yield

    def finish_data(self, stage: str) -> None:
        """Note that a stage that writes samples or groups has written all that it was to.

        Raises BonbonError where another command has come in between in one store.
        """
        source, output = self.ways(stage)
        notes, before = (self.store, "prompts") if stage == "sample" else (self, "sample")
        done = shard_indices(output)
        lacking = set(shard_indices(source)).difference(done)
        whole = notes.is_finished(before, source) and not lacking
        if not whole or self._is_anothers(stage):
            raise BonbonError(
                f"another command has changed what is in {self.data} meanwhile; let one work there "
                "at a time: the same command then goes on"
            )
        self.finish(stage, len(done))

    def _is_anothers(self, stage: str) -> bool:
        """Return whether the store's note of a stage is not the one that this folder has."""
        if self.store is self:
            return False
        own, other = self.noted(stage), self.store.noted(stage)
        if own is None or other is None:
            return True
        other["storage"] = self._place
        return not all(same_value(k, own.get(k), other.get(k)) for k in {*own, *other})

    def check_data(self, stage: str, settings: Mapping[str, Any]) -> None:
        """`compare` a stage that has written something, before what it builds on is made."""
        if shard_paths(self.ways(stage)[1]):
            self.compare(stage, {**settings, "storage": self._place})

    def begin_data(self, stage: str, settings: Mapping[str, Any]) -> None:
        """`begin` a stage that writes samples or groups, also where a store keeps them.

        So two runs with other settings cannot mix their shards in one store, and a run does not
        begin anew because its storage was left out. What this folder has begun and nothing came of
        is forgotten first.
        """
        own = {**settings, "storage": self._place}
        try:
            with reached(self.data, "use"):
                self._forget_what_came_to_nothing(stage)
                self.compare(stage, own)
                if self.store is not self:
                    self.store.refuse_strangers()
                    self.store.begin(stage, settings)
                self.begin(stage, own)
        except OSError as error:
            raise cannot_write(self.data, error) from error

    @property
    def _place(self) -> str | None:
        """The storage, as it is noted."""
        if self.store is self:
            return None
        return str(self.data if is_remote(self.data) else self.data.absolute())

    def _forget_what_came_to_nothing(self, stage: str) -> None:
        noted = self.noted(stage)
        if noted is None:
            return
        place = noted.get("storage")
        data = self.path if place is None else storage_path(place)
        if shard_paths(data / self.ways(stage)[1].name):
            return
        if place == self._place:
            self._forget_data(stage)
        else:
            self.forget(stage)

    def begin_training(self, name: str) -> None:
        """`begin` the training of the model of that name; one that came to nothing is forgotten."""
        from_main_process(partial(self._begin_training, name))

    def _begin_training(self, name: str) -> None:
        self._forget_training(name)
        self.begin(self.training(name), train_settings(self.config, self.rows, name))

    def has_trained(self, name: str) -> bool:
        """Return whether something came of the training of the model of that name."""
        return self.model(name).exists() or self.last_checkpoint(name) is not None

    def _forget_training(self, name: str) -> None:
        if not self.has_trained(name):
            self.forget(self.training(name))
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)

    def _forget_data(self, stage: str) -> None:
        for folder in {self, self.store}:
            folder.forget(stage)
            if stage == "sample":
                folder.forget("prompts")
        if stage == "sample":
            remove_folder(self.prompts)

    def model(self, name: str) -> Path:
        """Return where the model of that name is put."""
        if name == self.config.model_name:
            return self.path / "model"
        return self.path / "baselines" / name

    def training(self, name: str) -> str:
        """The stage that trains the model of that name, called after where it is put."""
        return "train" if name == self.config.model_name else f"train-baseline-{name}"

    def checkpoints(self, name: str) -> Path:
        """Return where the checkpoints of a training lie until it is done."""
        return self._notes / f"{self.training(name)}-checkpoints"

    def last_checkpoint(self, name: str) -> Path | None:
        """The newest whole checkpoint of a training; torn ones are removed."""
        found = []
        for folder in self.checkpoints(name).glob("checkpoint-*"):
            # The trainer's state is the last file that a checkpoint gets.
            try:
                read_json(folder / "trainer_state.json")
            except BonbonError:
                shutil.rmtree(folder)
                continue
            found.append(folder)
        return max(found, key=lambda folder: int(folder.name.split("-")[1]), default=None)
