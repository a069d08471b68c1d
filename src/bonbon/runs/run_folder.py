"""A run's folder: its paths, with the notes of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from bonbon.config.run import RunConfig, round_config
from bonbon.groups.shards import shard_indices, shard_paths
from bonbon.rewards.identity import same_value
from bonbon.runs.cleanup import (
    forget_empty_stage,
    forget_empty_training,
    has_trained,
    last_checkpoint,
)
from bonbon.runs.fingerprints import sample_settings, score_settings, train_settings
from bonbon.runs.lock import locked, refuse_strangers
from bonbon.runs.notes import Notes
from bonbon.runs.paths import RunPaths
from bonbon.runs.prompts import RunPrompts
from bonbon.runs.stage import Stage
from bonbon.system.errors import BonbonError
from bonbon.system.processes import from_main_process
from bonbon.system.storage import cannot_write, is_remote, reached

_STORE = "storage"  # the option by which a store is chosen


class RunFolder(RunPaths):
    """A run's folder, in which its stages begin and finish.

    `rows` are the prompts that the configuration names; the rounds of a run share theirs. `notes`
    are the folder's, and `data_notes` those beside the samples and groups, in a store where there
    is one. `stages` has the stages that make samples and groups, by name.

    Raises BonbonError for a store that cannot be used.
    """

    def __init__(self, path: Path, config: RunConfig, rows: RunPrompts | None = None) -> None:
        super().__init__(path, config)
        self.config = config
        self.rows = rows or RunPrompts(config)
        self.notes = Notes(path, config)
        in_store = self.storage is not None
        self.data_notes = Notes(self.data, None, _STORE) if in_store else self.notes
        samples = partial(sample_settings, config, self.rows)
        scores = partial(score_settings, config, self.rows)
        self.stages = {
            "sample": Stage("sample", "prompts", self.prompts, self.samples, samples),
            "score": Stage("score", "sample", self.samples, self.groups, scores),
        }

    def rounds(self) -> list[RunFolder]:
        """Return the folders of the rounds; this one alone where there is one."""
        if self.config.rounds == 1:
            return [self]
        base: Path | str = self.config.model.name
        folders: list[RunFolder] = []
        for number in range(1, self.config.rounds + 1):
            config = round_config(self.config, number, base)
            folders.append(RunFolder(self.path / f"round-{number}", config, self.rows))
            base = folders[-1].model(self.config.model_name)
        return folders

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder; see `runs.lock.locked`."""
        return locked(self.path)

    @contextmanager
    def data_locked(self) -> Iterator[None]:
        """Hold a storage folder too, while samples or groups are made; a store has no locks."""
        if self.storage is None or is_remote(self.data):
            yield
            return
        with locked(self.data, _STORE):
            yield

    # --- samples and groups -----------------------------------------------------------------------

    def check_data(self, name: str) -> None:
        """Compare a stage that has written something, before what it builds on is made."""
        stage = self.stages[name]
        if self.notes.noted(name) is not None and shard_paths(stage.output):
            self.notes.compare(name, {**stage.fingerprint(), "storage": self.storage})

    def begin_data(self, name: str) -> None:
        """Note that a stage that writes samples or groups begins, also where a store keeps them.

        So two runs with other settings cannot mix their shards in one store, and a run does not
        start over because its storage was left out. What this folder has begun and nothing came of
        is forgotten first.
        """
        stage = self.stages[name]
        settings = stage.fingerprint()
        own = {**settings, "storage": self.storage}
        try:
            with reached(self.data, "use"):
                forget_empty_stage(self, stage, self.notes, (self.notes, self.data_notes))
                self.notes.compare(name, own)
                if self.storage is not None:
                    refuse_strangers(self.data, _STORE)
                    self.data_notes.begin(name, settings)
                self.notes.begin(name, own)
        except OSError as error:
            raise cannot_write(self.data, error) from error

    def finish_data(self, name: str) -> None:
        """Note that a stage that writes samples or groups has written all that it was to.

        Raises BonbonError where another command has come in between in one store.
        """
        stage = self.stages[name]
        done = shard_indices(stage.output)
        lacking = set(shard_indices(stage.source)).difference(done)
        notes = self.data_notes if stage.builds_on == "prompts" else self.notes
        whole = notes.is_finished(stage.builds_on, stage.source) and not lacking
        if not whole or self._is_anothers(name):
            raise BonbonError(
                f"another command has changed what is in {self.data} meanwhile; let one work there "
                "at a time; then the same command resumes"
            )
        self.notes.finish(name, len(done))

    def is_done(self, name: str) -> bool:
        """Return whether a stage that writes samples or groups is finished and whole."""
        return self.notes.is_finished(name, self.stages[name].output)

    def _is_anothers(self, name: str) -> bool:
        """Return whether the store's note of a stage is not the one that this folder has."""
        if self.storage is None:
            return False
        own, other = self.notes.noted(name), self.data_notes.noted(name)
        if own is None or other is None:
            return True
        other["storage"] = self.storage
        return not all(same_value(key, own.get(key), other.get(key)) for key in {*own, *other})

    # --- trainings --------------------------------------------------------------------------------

    def begin_training(self, name: str) -> None:
        """Note that the training of the model of that name begins.

        One that came to nothing is forgotten first.
        """
        from_main_process(partial(self._begin_training, name))

    def _begin_training(self, name: str) -> None:
        forget_empty_training(self, self.notes, name)
        self.notes.begin(self.training(name), train_settings(self.config, self.rows, name))

    def has_trained(self, name: str) -> bool:
        """Return whether something came of the training of the model of that name."""
        return has_trained(self, name)

    def last_checkpoint(self, name: str) -> Path | None:
        """The newest whole checkpoint of a training; torn ones are removed."""
        return last_checkpoint(self, name)
