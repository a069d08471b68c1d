"""Reading prompts from JSONL, CSV, Parquet or plain text files."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.groups.group import Group, Prompt
from bonbon.groups.tables import check_text, read_records
from bonbon.system.errors import BonbonError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its id, unique in its file."""

    prompt_id: str
    prompt: Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and the tokens that the model is conditioned on."""

    prompt_id: str
    prompt: Prompt
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, group: Group) -> EncodedPrompt:
        """Return the prompt of a group."""
        return cls(group.prompt_id, group.prompt, group.prompt_token_ids)

    def as_group(self) -> Group:
        """Return a group of this prompt without completions."""
        return Group(self.prompt_id, self.prompt, self.token_ids, (), (), (), ())


def read_prompts(
    path: Path,
    column: str = "prompt",
    id_column: str = "prompt_id",
    split: str | None = None,
    limit: int | None = None,
) -> list[PromptRow]:
    """Read the prompts of a file, in its order; see `iter_prompts`."""
    return list(iter_prompts(path, column, id_column, split, limit))


def iter_prompts(
    path: Path,
    column: str = "prompt",
    id_column: str = "prompt_id",
    split: str | None = None,
    limit: int | None = None,
) -> Iterator[PromptRow]:
    """Read the prompts of a file, in its order, one in memory at a time.

    A prompt is a text, used unchanged, or a list of {"role", "content"} messages (JSONL and
    Parquet). Ids come from `id_column` where the file has it, else from the row number. With
    `split`, only rows whose column `split` has that value are kept.

    Raises BonbonError, naming file and row, for an unknown file type, a missing column, text that
    is not UTF-8, a broken row, an empty prompt, text and chat prompts in one file, and at the end
    for a duplicate id or no prompts at all.
    """
    ids = _Ids()
    kind: type | None = None
    for number, record in read_records(path):
        where = f"{path}, row {number}"
        if column not in record:
            names = ", ".join(map(str, record)) or "none"
            raise BonbonError(
                f"{where}: no column {column!r} (columns: {names}); name it with --prompt-column"
            )
        if split is not None and record.get("split") != split:
            continue
        prompt_id = _id_of(record, id_column, number)
        check_text(prompt_id, "id", where)
        ids.add(prompt_id, number)
        prompt = checked_prompt(record[column], where)
        kind = kind or type(prompt)
        if not isinstance(prompt, kind):
            raise BonbonError(
                f"{where}: a file holds either plain-text or chat prompts, not both; split it"
            )
        yield PromptRow(prompt_id, prompt)
        if limit is not None and len(ids) == limit:
            break
    _check_ids(ids, path, id_column)
    if not len(ids):
        wanted = f" with split {split!r}" if split is not None else ""
        raise BonbonError(f"{path}: no prompts{wanted} in the file")


def _id_of(record: dict[str, Any], id_column: str, number: int) -> str:
    value = record.get(id_column)
    return f"row-{number}" if value is None else str(value)


class _Ids:
    """Digests of ids with their row numbers, 16 bytes for each prompt."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self._numbers = array("Q")

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, prompt_id: str, number: int) -> None:
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, "big"))
        self._numbers.append(number)

    def twice(self) -> tuple[int, int] | None:
        """Return the two rows of the first id that occurs twice; None where none does."""
        digests, numbers = np.asarray(self._digests), np.asarray(self._numbers)
        order = np.argsort(digests, kind="stable")
        (same,) = np.nonzero(digests[order][1:] == digests[order][:-1])
        if not len(same):
            return None
        first = same[np.argmin(numbers[order[same + 1]])]
        return int(numbers[order[first]]), int(numbers[order[first + 1]])


def _check_ids(ids: _Ids, path: Path, id_column: str) -> None:
    rows = ids.twice()
    if rows is None:
        return
    record = next(record for number, record in read_records(path) if number == rows[1])
    raise BonbonError(
        f"{path}, row {rows[1]}: id {_id_of(record, id_column, rows[1])!r} was used by row "
        f"{rows[0]} already; give each row its own id"
    )


def is_held_out(row: PromptRow | Group, fraction: float, split: str = "") -> bool:
    """Return whether a prompt belongs to the held-out `fraction`, by its hash.

    So it does not depend on the order, and a prompt that occurs twice is on one side. Splits of
    different names are independent of each other, so a split of a split needs another name.
    """
    text = json.dumps(row.prompt, ensure_ascii=False).encode()
    digest = hashlib.blake2b(text, digest_size=8, salt=split.encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def checked_prompt(value: Any, where: str) -> Prompt:
    """Return a valid prompt: a text that is not empty, or messages that end before an answer.

    Raises BonbonError, naming the place `where` it is, for anything else.
    """
    check_text(value, "prompt", where)
    if isinstance(value, str):
        if not value.strip():
            raise BonbonError(f"{where}: the prompt is empty")
        return value
    if not isinstance(value, list) or not value:
        raise BonbonError(f"{where}: a prompt is a text or a list of messages, not {value!r:.80}")
    for message in value:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise BonbonError(
                f'{where}: a message is {{"role": {"|".join(ROLES)}, "content": text}}, '
                f"not {message!r:.80}"
            )
    if value[-1]["role"] == "assistant":
        raise BonbonError(
            f"{where}: the last message is the assistant's; nothing is left to answer"
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]
