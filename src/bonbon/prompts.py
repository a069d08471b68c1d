"""Reading prompts from JSONL, CSV, Parquet or plain text files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bonbon.errors import BonbonError
from bonbon.groups import Group, Prompt

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


Row = TypeVar("Row", PromptRow, Group)


def read_prompts(
    path: Path,
    column: str = "prompt",
    id_column: str = "prompt_id",
    split: str | None = None,
    limit: int | None = None,
) -> list[PromptRow]:
    """The prompts of a file, in its order.

    A prompt is a text, taken as it is, or a list of {"role", "content"} messages (JSONL and
    Parquet). Ids come from `id_column` where the file has it, else from the row number. With
    `split`, only rows whose column `split` has that value are kept.

    Raises BonbonError, naming file and row, for an unknown file type, a missing column, text that
    is not UTF-8, a broken row, an empty prompt, a duplicate id, text and chat prompts in one file,
    or no prompts at all.
    """
    rows: list[PromptRow] = []
    seen: dict[str, int] = {}
    for number, record in read_records(path):
        where = f"{path}, row {number}"
        if column not in record:
            names = ", ".join(map(str, record)) or "none"
            raise BonbonError(
                f"{where}: no column {column!r} (columns: {names}); name it with --prompt-column"
            )
        if split is not None and record.get("split") != split:
            continue
        found = record.get(id_column)
        prompt_id = f"row-{number}" if found is None else str(found)
        check_text(prompt_id, "id", where)
        if prompt_id in seen:
            raise BonbonError(
                f"{where}: id {prompt_id!r} was used by row {seen[prompt_id]} already"
            )
        seen[prompt_id] = number
        prompt = checked_prompt(record[column], where)
        if rows and isinstance(prompt, str) != isinstance(rows[0].prompt, str):
            raise BonbonError(
                f"{where}: a file holds either plain-text or chat prompts, not both; split it"
            )
        rows.append(PromptRow(prompt_id, prompt))
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        wanted = f" with split {split!r}" if split is not None else ""
        raise BonbonError(f"{path}: no prompts{wanted} in the file")
    return rows


def hold_out(rows: Iterable[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split into (kept, held out) by a hash of the prompt.

    So the split survives reordering, and a prompt that occurs twice is on one side.
    """
    kept: list[Row] = []
    held: list[Row] = []
    for row in rows:
        text = json.dumps(row.prompt, ensure_ascii=False).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        (held if int.from_bytes(digest, "big") < fraction * 2**64 else kept).append(row)
    return kept, held


def check_text(value: Any, what: str, where: str) -> None:
    """Raise BonbonError for a lone surrogate, which no file can hold as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BonbonError(f"{where}: the {what} has a lone surrogate, which is no text") from error


def checked_prompt(value: Any, where: str) -> Prompt:
    """A prompt that is one: a text with something in it, or messages with one left to answer.

    Raises BonbonError, saying `where` it stands, for anything else.
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


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL, CSV, Parquet or text file (its lines in the column `prompt`), numbered.

    Raises BonbonError, naming file and row, for what cannot be read.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
        ".txt": _text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BonbonError(f"{path}: unknown file type; use one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise BonbonError(f"{path} is not UTF-8 ({_wrong_line(path)}); convert it first") from error
    except OSError as error:
        raise BonbonError(f"cannot read {path}: {error.strerror or error}") from error


def _wrong_line(path: Path) -> str:
    """Where a file stops being UTF-8; the error of reading by blocks knows only its block."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number}, byte {error.start + 1}"
    return "at its end"


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BonbonError(f"{path}, row {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise BonbonError(f"{path}, row {number}: not a JSON object")
            yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for number, record in enumerate(csv.DictReader(lines, strict=True), start=1):
                # A short row lacks its last fields (None), a long one has the rest under None.
                if None in record or None in record.values():
                    raise BonbonError(
                        f"{path}, row {number}: fields and header do not match; check the quotes"
                    )
                yield number, record
        except csv.Error as error:
            raise BonbonError(f"{path}: broken CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pa.ArrowException as error:
        raise BonbonError(f"{path} is not a readable Parquet file: {error}") from error


def _text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One prompt a line; blank lines are passed over."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"prompt": line.rstrip("\r\n")}
