"""Tries counted outside the worker processes, and the prompts that were set aside."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bonbon.groups.group import Groups, Prompt
from bonbon.groups.shards import read_shard, write_shard
from bonbon.system.atomic_files import read_json, write_json, write_text
from bonbon.system.errors import BonbonError
from bonbon.system.storage import files_in, is_there, reached, remove_folder

DIED = "its worker died each time"


@dataclass(frozen=True)
class Try:
    """A try that failed: its worker died (`reason` None), or the stage raised `reason`."""

    prompt_id: str | None  # None: of a whole shard, or of a model's loading
    node: str
    reason: str | None = None


@dataclass(frozen=True)
class Mark:
    """The marker of a try that is under way."""

    path: Path
    attempt: Try


@dataclass(frozen=True)
class Ledger:
    """The tries of one stage, as files of `folder`, which every worker can access.

    `actor` and `node` identify this worker; `alive` says whether a node is still alive. All methods
    raise BonbonError when the folder cannot be accessed.
    """

    folder: Path
    node: str
    actor: str
    alive: Callable[[str], bool]

    def begin(self, shard: int, prompt_id: str | None = None) -> Mark:
        """Record that a try starts."""
        return self._begin(self._of(shard), prompt_id)

    def begin_loading(self) -> Mark:
        """Record that this worker starts to load its model."""
        return self._begin(self._loads, None)

    def failed(self, mark: Mark, reason: str) -> None:
        """Record permanently why a try failed."""
        attempt = Try(mark.attempt.prompt_id, mark.attempt.node, reason)
        write_json(mark.path, asdict(attempt))

    def ended(self, mark: Mark) -> None:
        """Remove the marker of a try that ended."""
        with reached(mark.path, "remove"):
            mark.path.unlink()

    def tries(self, shard: int) -> list[Try]:
        """Return the tries of a shard that failed or never ended."""
        return _read_tries(self._of(shard))

    def loads(self) -> list[Try]:
        """Return this worker's model loads that never ended, since the last one that did."""
        return _read_tries(self._loads)

    def loaded(self) -> None:
        """Remove the markers of this worker's model loads."""
        remove_folder(self._loads)

    def keep(self, shard: int, number: int, made: Groups) -> None:
        """Keep the result of a try of prompt `number` alone."""
        write_shard(self._of(shard) / f"made-{number:05d}.parquet", made, made.provenance)

    def kept(self, shard: int) -> dict[int, Groups]:
        """Return the results of prompts tried alone, by the prompts' numbers in the shard."""
        paths = [path for path in files_in(self._of(shard)) if path.name.startswith("made-")]
        return {int(path.stem.removeprefix("made-")): read_shard(path) for path in paths}

    def forget(self, shard: int) -> None:
        """Remove all records of a shard."""
        remove_folder(self._of(shard))

    def charged(self, tries: Sequence[Try], forgiven: int) -> int:
        """Count the tries; of those lost with their node, only the ones beyond `forgiven` count."""
        lost = sum(1 for it in tries if it.reason is None and not self.alive(it.node))
        return len(tries) - min(lost, forgiven)

    def _begin(self, folder: Path, prompt_id: str | None) -> Mark:
        mark = Mark(folder / f"try-{uuid.uuid4().hex}.json", Try(prompt_id, self.node))
        write_json(mark.path, asdict(mark.attempt))
        return mark

    def _of(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}"

    @property
    def _loads(self) -> Path:
        return self.folder / f"loading-{self.actor}"


def _read_tries(folder: Path) -> list[Try]:
    paths = [path for path in files_in(folder) if path.name.startswith("try-")]
    return [Try(**read_json(path)) for path in paths]


def reasons(tries: Iterable[Try]) -> str:
    """Return why tries failed: the last error raised, or that the worker died."""
    raised = [it.reason for it in tries if it.reason is not None]
    return raised[-1] if raised else DIED


# --- dead letters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeadLetter:
    """A prompt that was set aside in a stage, with the reason."""

    stage: str
    prompt_id: str
    prompt: Prompt
    reason: str
    tries: int
    shards: list[str]  # files to delete if it is to be tried again

    @property
    def key(self) -> tuple[str, str]:
        """The key that identifies a dead letter."""
        return self.stage, self.prompt_id


@dataclass(frozen=True)
class DeadLetters:
    """The prompts set aside: `dead_letters.jsonl` in a run's data, one line each.

    Workers write to a folder beside the file (stores cannot append to a file), from which the
    command gathers them.
    """

    data: Path

    @property
    def path(self) -> Path:
        """The file, which exists once a prompt was set aside."""
        return self.data / "dead_letters.jsonl"

    def add(self, letter: DeadLetter) -> None:
        """Set a prompt aside; the record is on disk once this returns."""
        write_json(self._new / f"{uuid.uuid4().hex}.json", asdict(letter))

    def read(self) -> list[DeadLetter]:
        """Read all of them. Raises BonbonError for a line that is not a dead letter."""
        letters = {letter.key: letter for letter in self._lines()}
        for path in files_in(self._new):
            if path.suffix == ".json":
                letter = DeadLetter(**read_json(path))
                letters.setdefault(letter.key, letter)
        return list(letters.values())

    def drop_unwritten(self) -> None:
        """Drop the prompts whose shard is not written yet: the shard will be tried again."""
        letters = self.gather()
        final = [letter for letter in letters if is_there(self.data / letter.shards[0])]
        if len(final) < len(letters):
            self._write(final)

    def gather(self) -> list[DeadLetter]:
        """Move those in the folder into the file, and return all of them."""
        letters = self.read()
        if files_in(self._new):
            self._write(letters)
            remove_folder(self._new)
        return letters

    def _write(self, letters: Sequence[DeadLetter]) -> None:
        lines = [json.dumps(asdict(letter), ensure_ascii=False) for letter in letters]
        write_text(self.path, "".join(f"{line}\n" for line in lines))

    @property
    def _new(self) -> Path:
        return self.data / ".bonbon" / "dead-letters"

    def _lines(self) -> list[DeadLetter]:
        if not is_there(self.path):
            return []
        with reached(self.path, "read"):
            text = self.path.read_text(encoding="utf-8")
        return [_letter(line, self.path) for line in text.split("\n") if line.strip()]


def _letter(line: str, path: Path) -> DeadLetter:
    try:
        values: dict[str, Any] = json.loads(line)
        return DeadLetter(**values)
    except (ValueError, TypeError) as error:
        raise BonbonError(
            f"{path} has a line that is not a dead letter ({line!r:.60}); delete it"
        ) from error
