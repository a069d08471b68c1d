"""Notes of the stages that write into a folder, so that what must not be mixed is not.

Each stage notes the settings its output depends on under `.bonbon/` before it starts. The same
command later finds the note, compares, and resumes; a command with other settings is refused with
the names of what differs. Settings that cannot change a result (batch sizes in tokens, devices) are
not compared, nor are digests of a reward that are unknown, as they are to older notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bonbon.config.notes import binding, upgraded_note
from bonbon.config.settings import Settings
from bonbon.groups.shards import shard_paths
from bonbon.rewards.identity import changed_digest, is_digest, same_value
from bonbon.runs.lock import OUT
from bonbon.system.atomic_files import read_json, write_json, write_text
from bonbon.system.errors import BonbonError


class Notes:
    """Notes of what each stage in a folder was asked for, and whether it is finished.

    `config` is written to `config.yaml` as a stage begins; None: it is another folder's. `option`
    is the one by which the folder is chosen.
    """

    def __init__(self, path: Path, config: Settings | None, option: str = OUT) -> None:
        self.path = path
        self._config = config
        self._option = option
        self._folder = path / ".bonbon"

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
        write_json(self._folder / f"{stage}.json", dict(settings))

    def write_config(self) -> None:
        """Write the configuration to `config.yaml`, where there is one."""
        if self._config is not None:
            dump = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
            write_text(self.path / "config.yaml", dump)

    def forget(self, stage: str) -> None:
        """Drop a stage's notes, where nothing came of it."""
        for name in (f"{stage}.json", f"{stage}.done.json"):
            (self._folder / name).unlink(missing_ok=True)

    def noted(self, stage: str) -> dict[str, Any] | None:
        """Return the settings that a stage was begun with; None where it was not."""
        note = self._folder / f"{stage}.json"
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
        write_json(self._folder / f"{stage}.done.json", {"shards": shards})

    def is_finished(self, stage: str, output: Path) -> bool:
        """Return whether a stage was finished and its shards are still all there."""
        note = self._folder / f"{stage}.done.json"
        return note.exists() and read_json(note)["shards"] == len(shard_paths(output))


def _difference(key: str, noted: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Describe a difference; None for the digest of a reward that has another name by now."""
    if is_digest(key):
        return changed_digest(key, noted, wanted)
    return f"{key} was {noted.get(key)!r} and is now {wanted.get(key)!r}"


def _new_digests(noted: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests that are known by now and not noted; notes of older versions have none."""
    known = {key: value for key, value in asked.items() if is_digest(key) and value is not None}
    return {key: value for key, value in known.items() if noted.get(key) is None}
