"""Judgements on disk: a Parquet file, and the journal of the current run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bonbon.system.atomic_files import atomic_path
from bonbon.system.errors import BonbonError

SCHEMA_VERSION = 1
_METADATA_KEY = b"bonbon"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.string()),
        ("draw", pa.int32()),
        ("swapped", pa.bool_()),
        ("verdict", pa.string()),
        ("reply", pa.string()),
    ]
)


@dataclass(frozen=True)
class Judgement:
    """The result of one request: one of the two orders of a comparison (see `evaluation.judge`)."""

    key: str
    prompt_id: str
    draw: int
    swapped: bool
    verdict: str | None
    reply: str


def read_judgements(path: Path) -> list[Judgement]:
    """Read the judgements of a file, and of its journal if a run was killed; one a key.

    Lone surrogates in texts have become "?". Raises BonbonError when there is no file, or when it
    is not a Parquet file of judgements.
    """
    _, kept = _read_parquet(path)
    return list(_by_key([*kept, *_read_journal(path)]).values())


def open_judgements(path: Path, model: str) -> dict[str, Judgement]:
    """Read the known judgements, by key, and create the file if there is none.

    So a journal always has a file that names its judge, and a folder that cannot be written fails
    before the first request.
    """
    if not path.exists():
        _write_parquet(path, model, [])
    judge, kept = _read_parquet(path)
    if judge != model:
        raise BonbonError(
            f"{path} holds judgements by {judge!r}, not by {model!r}; delete it or choose another "
            "file"
        )
    known = _by_key([*kept, *_read_journal(path)])
    fold_journal(path, model, known)
    return known


def _by_key(judgements: Iterable[Judgement]) -> dict[str, Judgement]:
    return {judgement.key: judgement for judgement in judgements}


def keep_judgement(judgement: Judgement, path: Path, known: dict[str, Judgement]) -> None:
    """Add a judgement to the journal and to `known`. Raises BonbonError when that fails."""
    known[judgement.key] = judgement
    journal = _journal_path(path)
    try:
        with journal.open("ab") as file:
            file.write(json.dumps(asdict(judgement)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BonbonError(f"cannot write {journal}: {error.strerror or error}") from error


def fold_journal(path: Path, model: str, known: Mapping[str, Judgement]) -> None:
    """Merge the journal into the file; a stop in between leaves both, which agree."""
    journal = _journal_path(path)
    if journal.exists():
        _write_parquet(path, model, known.values())
        journal.unlink(missing_ok=True)


def _journal_path(path: Path) -> Path:
    return path.with_suffix(".journal.jsonl")


def _read_journal(path: Path) -> list[Judgement]:
    journal = _journal_path(path)
    if not journal.exists():
        return []
    try:
        lines = journal.read_bytes().split(b"\n")
    except OSError as error:
        raise BonbonError(f"cannot read {journal}: {error.strerror or error}") from error
    judgements = []
    for line in lines:
        try:
            judgements.append(Judgement(**json.loads(line)))
        except (ValueError, TypeError):  # cut off by a stop: it is asked for again
            continue
    return judgements


def _read_parquet(path: Path) -> tuple[str, list[Judgement]]:
    """Read the judge's model and its judgements."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise BonbonError(f"cannot read {path} as Parquet: {error}") from error
    record = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    if "judge" not in record or record.get("schema_version") != SCHEMA_VERSION:
        raise BonbonError(
            f"{path} holds no judgements of schema version {SCHEMA_VERSION}; delete it or choose "
            "another file"
        )
    return record["judge"], [Judgement(**row) for row in table.to_pylist()]


def _write_parquet(path: Path, model: str, judgements: Iterable[Judgement]) -> None:
    rows = [
        {k: _without_surrogates(v) if isinstance(v, str) else v for k, v in asdict(j).items()}
        for j in judgements
    ]
    record = json.dumps({"schema_version": SCHEMA_VERSION, "judge": model})
    schema = _SCHEMA.with_metadata({_METADATA_KEY: record})
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def _without_surrogates(text: str) -> str:
    return text.encode(errors="replace").decode()
