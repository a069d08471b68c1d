"""A folder that stages write into: its lock, and notes of its settings."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bonbon.config.notes import binding, upgraded_note
from bonbon.config.settings import Settings
from bonbon.groups.shards import shard_paths
from bonbon.rewards.identity import changed_digest, is_digest, same_value
from bonbon.system.atomic_files import read_json, remove_torn, write_json, write_text
from bonbon.system.errors import BonbonError
from bonbon.system.processes import is_main_process, wait_for_everyone


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
        """Note a stage's settings, or `compare` them with those it was begun with.

        Of processes that train together the main one alone calls this.
        """
        self.compare(stage, settings)
        noted, asked = self.noted(stage), binding(settings)
        if noted is None:
            # The note last: a stop between the two would otherwise leave an older config.yaml.
            self.write_config()
            self._note(stage, asked)
        elif learnt := _new_digests(noted, asked):
            self._note(stage, noted | learnt)

    def _note(self, stage: str, settings: Mapping[str, Any]) -> None:
        write_json(self._notes / f"{stage}.json", dict(settings))

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
        wanted = binding(settings)
        differing = self._differing(stage, wanted)
        if differing:
            raise BonbonError(
                f"{self.path} was made with other settings: {'; '.join(differing[:5])}"
                f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}; choose "
                f"another {self._option}, or undo the change"
            )

    def _differing(self, stage: str, wanted: Mapping[str, Any]) -> list[str]:
        differing: dict[str, str | None] = {}
        for name in ("sample", "score", "rounds", stage):
            note = self.noted(name)
            if note is None:
                continue
            noted = upgraded_note(note)
            keys = {*noted, *wanted} if name == stage else noted.keys() & wanted.keys()
            for key in sorted(keys):
                if not same_value(key, noted.get(key), wanted.get(key)):
                    differing[key] = _difference(key, noted, wanted)
        return [difference for difference in differing.values() if difference is not None]

    def finish(self, stage: str, shards: int) -> None:
        """Note that a stage has written all its shards."""
        write_json(self._notes / f"{stage}.done.json", {"shards": shards})

    def is_finished(self, stage: str, output: Path) -> bool:
        """Return whether a stage was finished and its shards are still all there."""
        note = self._notes / f"{stage}.done.json"
        return note.exists() and read_json(note)["shards"] == len(shard_paths(output))


def _difference(key: str, noted: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Describe a difference; None for the digest of a reward that has another name by now."""
    if is_digest(key):
        return changed_digest(key, noted, wanted)
    return f"{key} was {noted.get(key)!r} and is now {wanted.get(key)!r}"


def _new_digests(noted: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The digests that are known by now and not noted; notes of older versions have none."""
    known = {key: value for key, value in asked.items() if is_digest(key) and value is not None}
    return {key: value for key, value in known.items() if noted.get(key) is None}
