"""Read rows of text from JSONL, CSV, Parquet and text files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bonbon.system.errors import BonbonError


def check_text(value: Any, what: str, where: str) -> None:
    """Raise BonbonError for a lone surrogate, which no file can hold as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BonbonError(f"{where}: the {what} has a lone surrogate, which is no text") from error


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a JSONL, CSV, Parquet or text file with their numbers, from 1.

    A text file's lines are in the column `prompt`. Raises BonbonError, naming file and row, for
    what cannot be read.
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
    """Describe the first place that is not UTF-8; a decoding error counts within a block only."""
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
    """Read one prompt from each line; blank lines are skipped."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"prompt": line.rstrip("\r\n")}
