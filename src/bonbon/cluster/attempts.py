"""Tries counted outside the processes that make them, and the prompts that used theirs up."""

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
    """The tries of one stage, as files of `folder`, which every worker reaches.

    `actor` and `node` say who is trying; `alive` whether a node still is. All methods raise
    BonbonError when the folder cannot be reached.
    """

    folder: Path
    node: str
    actor: str
    alive: Callable[[str], bool]

    def begin(self, shard: int, prompt_id: str | None = None) -> Mark:
        """Note that a try begins."""
        return self._begin(self._of(shard), prompt_id)

    def begin_loading(self) -> Mark:
        """Note that this worker begins to load its model."""
        return self._begin(self._loads, None)

    def failed(self, mark: Mark, reason: str) -> None:
        """Note why a try failed, for good."""
        attempt = Try(mark.attempt.prompt_id, mark.attempt.node, reason)
        write_json(mark.path, asdict(attempt))

    def ended(self, mark: Mark) -> None:
        """Forget a try that came to its end."""
        with reached(mark.path, "remove"):
            mark.path.unlink()

    def tries(self, shard: int) -> list[Try]:
        """The tries of a shard that failed, or never ended."""
        return _read_tries(self._of(shard))

    def loads(self) -> list[Try]:
        """This worker's loads of its model that never ended, since the last one that did."""
        return _read_tries(self._loads)

    def loaded(self) -> None:
        """Forget this worker's loads."""
        remove_folder(self._loads)

    def keep(self, shard: int, number: int, made: Groups) -> None:
        """Keep what a try of prompt `number` alone made."""
        write_shard(self._of(shard) / f"made-{number:05d}.parquet", made, made.provenance)

    def kept(self, shard: int) -> dict[int, Groups]:
        """What tries alone have made, by the prompts' numbers in the shard."""
        found = [path for path in files_in(self._of(shard)) if path.name.startswith("made-")]
        return {int(path.stem.removeprefix("made-")): read_shard(path) for path in found}

    def forget(self, shard: int) -> None:
        """Remove all that is noted of a shard."""
        remove_folder(self._of(shard))

    def charged(self, tries: Sequence[Try], forgiven: int) -> int:
        """How many of the tries count: those that ended with their node only beyond `forgiven`."""
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
    found = [path for path in files_in(folder) if path.name.startswith("try-")]
    return [Try(**read_json(path)) for path in found]


def reasons(tries: Iterable[Try]) -> str:
    """Why tries failed: what was raised last, or that the worker died."""
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
        """What tells one from another."""
        return self.stage, self.prompt_id


@dataclass(frozen=True)
class DeadLetters:
    """The prompts set aside: `dead_letters.jsonl` of a run's data, a line each.

    Workers put theirs into a folder beside (stores cannot append to a file), from where the
    command gathers them.
    """

    data: Path

    @property
    def path(self) -> Path:
        """The file, which is there when a prompt was set aside."""
        return self.data / "dead_letters.jsonl"

    def add(self, letter: DeadLetter) -> None:
        """Set a prompt aside, for good once this returns."""
        write_json(self._new / f"{uuid.uuid4().hex}.json", asdict(letter))

    def read(self) -> list[DeadLetter]:
        """All of them. Raises BonbonError when a line is not one."""
        found = {letter.key: letter for letter in self._lines()}
        for path in files_in(self._new):
            if path.suffix == ".json":
                letter = DeadLetter(**read_json(path))
                found.setdefault(letter.key, letter)
        return list(found.values())

    def drop_unwritten(self) -> None:
        """Forget the prompts whose shard was not written without them: it will be tried again."""
        letters = self.gather()
        final = [letter for letter in letters if is_there(self.data / letter.shards[0])]
        if len(final) < len(letters):
            self._write(final)

    def gather(self) -> list[DeadLetter]:
        """Write all of them into the file, and clear the folder beside; all of them."""
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
            f"{path} has a line that is no dead letter ({line!r:.60}); delete it"
        ) from error
