"""A run's folder: what was asked for, and what must not be mixed.

Each stage notes the settings its output depends on under `.bonbon/` before it starts. The same
command later finds the note, compares, and goes on; a command with other settings is refused with
the names of what differs. Settings that cannot change a result (batch sizes in tokens, devices) are
not compared.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bonbon.config import RunConfig, round_config
from bonbon.distributed import from_main_process, is_main_process, wait_for_everyone
from bonbon.errors import BonbonError
from bonbon.files import read_json, remove_torn, write_json, write_text
from bonbon.groups import shard_indices, shard_paths
from bonbon.settings import Settings, flatten
from bonbon.storage import cannot_write, is_remote, reached, remove_folder, storage_path

NEUTRAL = frozenset(
    {
        "max_batch_tokens", "device",
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "gpu_memory_utilization",
        "base_url", "api_key_env", "timeout", "deadline", "retries", "concurrency",
    }
)  # fmt: skip


class StageFolder:
    """A folder that stages write into, with notes under `.bonbon/` of what they were asked for."""

    _option = "--out"  # by which it is chosen

    def __init__(self, path: Path, config: Settings) -> None:
        self.path = path
        self._settings = config
        self._notes = path / ".bonbon"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; BonbonError when another process does, or it cannot be written.

        Of processes that train together the main one holds it for all.
        """
        if not is_main_process():
            wait_for_everyone()
            yield
            return
        try:
            self.refuse_strangers()
            self._notes.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._notes / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BonbonError(
                f"cannot write the output folder {self.path}: {error.strerror}; choose "
                f"another {self._option}"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BonbonError(
                    f"another bonbon process is working in {self.path}; wait for it or choose "
                    f"another {self._option}"
                ) from error
            remove_torn(self.path)
            wait_for_everyone()  # none goes ahead of the lock
            yield
        finally:
            os.close(handle)

    def refuse_strangers(self) -> None:
        """Raise BonbonError where the folder holds something, and no run."""
        if not self.path.is_dir():
            return
        strangers = [p.name for p in self.path.iterdir() if p.name != ".bonbon"]
        if strangers and not any(self._notes.glob("*.json")):
            raise BonbonError(
                f"{self.path} is not empty and holds no run ({strangers[0]} is in it); choose "
                f"another {self._option}"
            )

    def begin(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Note a stage's settings, or `compare` them with those it was begun with."""
        from_main_process(lambda: self._begin(stage, settings))

    def _begin(self, stage: str, settings: Mapping[str, Any]) -> None:
        self.compare(stage, settings)
        if self.noted(stage) is None:
            # The note last: a stop between the two would otherwise leave an older config.yaml.
            self.write_config()
            write_json(self._notes / f"{stage}.json", _binding(settings))

    def write_config(self) -> None:
        """Write the configuration to `config.yaml`."""
        dump = yaml.safe_dump(self._settings.model_dump(mode="json"), sort_keys=False)
        write_text(self.path / "config.yaml", dump)

    def forget(self, stage: str) -> None:
        """Drop a stage's notes, where nothing came of it."""
        for name in (f"{stage}.json", f"{stage}.done.json"):
            (self._notes / name).unlink(missing_ok=True)

    def noted(self, stage: str) -> dict[str, Any] | None:
        """The settings that a stage was begun with; None where it was not."""
        note = self._notes / f"{stage}.json"
        return read_json(note) if note.exists() else None

    def refuse(self, *stages: str, what: str) -> None:
        """Raise BonbonError when the folder holds one of the stages, since it is `what`."""
        if any(self.noted(stage) is not None for stage in stages):
            raise BonbonError(f"{self.path} holds {what}; choose another --out")

    def compare(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Compare a stage's settings with those it was begun with, if it was.

        Settings shared with the stages that it builds on are compared with theirs too. Raises
        BonbonError naming what differs.
        """
        wanted = _binding(settings)
        differing = self._differing(stage, wanted)
        if differing:
            raise BonbonError(
                f"{self.path} was made with other settings: {'; '.join(differing[:5])}"
                f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}; choose "
                f"another {self._option}, or undo the change"
            )

    def _differing(self, stage: str, wanted: Mapping[str, Any]) -> list[str]:
        differing: dict[str, str] = {}
        for name in ("sample", "score", "rounds", stage):
            found = self.noted(name)
            if found is None:
                continue
            keys = {*found, *wanted} if name == stage else found.keys() & wanted.keys()
            for key in sorted(keys):
                was, now = found.get(key), wanted.get(key)
                if was != now:
                    differing[key] = f"{key} was {was!r} and is now {now!r}"
        return list(differing.values())

    def finish(self, stage: str, shards: int) -> None:
        """Note that a stage has written all its shards."""
        write_json(self._notes / f"{stage}.done.json", {"shards": shards})

    def is_finished(self, stage: str, output: Path) -> bool:
        """Whether a stage was finished and its shards are still all there."""
        note = self._notes / f"{stage}.done.json"
        return note.exists() and read_json(note)["shards"] == len(shard_paths(output))


class _Store(StageFolder):
    """Where samples and groups lie apart from a run's folder, which keeps the configuration."""

    _option = "storage"

    def write_config(self) -> None:
        """The run's folder has it."""


class RunFolder(StageFolder):
    """The layout of a run's folder.

    `prompts/`, `samples/` and `groups/` hold the prompts, the drawn and the scored groups; they may
    lie in a store (`storage`) instead. `model/` and `baselines/NAME/` hold the trained models,
    `evaluation/` the evaluation, `.bonbon/` notes and training checkpoints.

    Raises BonbonError for a store that cannot be used.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        super().__init__(path, config)
        self.config = config
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
            folders.append(RunFolder(self.path / f"round-{number}", config))
            base = folders[-1].model(self.config.model_name)
        return folders

    def ways(self, stage: str) -> tuple[Path, Path]:
        """Where the shards of the stage `sample` or `score` come from and go to."""
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
        """Whether the store's note of a stage is not the one that this folder has."""
        return self.store is not self and self.noted(stage) != {
            **(self.store.noted(stage) or {}),
            "storage": self._place,
        }

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

    def begin_training(self, name: str, settings: Mapping[str, Any]) -> None:
        """`begin` the training of the model of that name; one that came to nothing is forgotten."""
        from_main_process(partial(self._forget_training, name))
        self.begin(self.training(name), settings)

    def has_trained(self, name: str) -> bool:
        """Whether something came of the training of the model of that name."""
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
        """Where the model of that name is put."""
        if name == self.config.model_name:
            return self.path / "model"
        return self.path / "baselines" / name

    def training(self, name: str) -> str:
        """The stage that trains the model of that name, called after where it is put."""
        return "train" if name == self.config.model_name else f"train-baseline-{name}"

    def checkpoints(self, name: str) -> Path:
        """Where the checkpoints of a training lie until it is done."""
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


def _binding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change a result, flattened."""
    return {
        key: value
        for key, value in flatten(settings).items()
        if key.rsplit(".", 1)[-1] not in NEUTRAL
    }
