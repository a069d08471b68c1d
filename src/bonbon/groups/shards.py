"""Groups in Parquet files: write, read and iterate over shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bonbon.groups.group import Group, Groups
from bonbon.system.atomic_files import atomic_path
from bonbon.system.errors import BonbonError
from bonbon.system.prefetch import in_turn
from bonbon.system.storage import is_remote, reached, storage_path

SCHEMA_VERSION = 1


_METADATA_KEY = b"bonbon"


def _schema(chat: bool) -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    # Not a map: `datasets` cannot open that type.
    metric = pa.struct([("name", pa.string()), ("values", pa.list_(pa.float64()))])
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.list_(message) if chat else pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("completions", pa.list_(pa.string())),
            ("token_ids", pa.list_(pa.list_(pa.int32()))),
            ("logprobs", pa.list_(pa.float64())),
            ("rewards", pa.list_(pa.float64())),
            ("finish_reasons", pa.list_(pa.string())),
            ("metrics", pa.list_(metric)),
        ]
    )


def shard_path(folder: Path, index: int) -> Path:
    """Return the path of shard `index` of a data set."""
    return folder / f"shard-{index:05d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    """Return the paths of a data set's finished shards, in order."""
    with reached(folder, "read"):
        if is_remote(folder) and not folder.is_dir():  # object stores have no empty folders
            return []
        return sorted(folder.glob("shard-*.parquet"))


def shard_indices(folder: Path) -> list[int]:
    """Return the indices of a data set's finished shards, ascending."""
    return [int(path.stem.removeprefix("shard-")) for path in shard_paths(folder)]


def write_shard(path: Path, groups: Sequence[Group], provenance: Mapping[str, Any]) -> None:
    """Write one shard atomically (temporary file, fsync, rename).

    Raises BonbonError when plain-text and chat prompts are mixed or the folder cannot be written.
    """
    kinds = {isinstance(group.prompt, str) for group in groups}
    if len(kinds) > 1:
        raise BonbonError(
            f"{path.name}: a data set holds either plain-text or chat prompts, not both; split it"
        )
    schema = _schema(chat=kinds == {False})
    record = {"schema_version": SCHEMA_VERSION, "provenance": dict(provenance)}
    table = pa.Table.from_pylist([group.to_row() for group in groups], schema=schema)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(record, ensure_ascii=False)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_shard(path: Path) -> Groups:
    """Read one shard. Raises BonbonError when it is not a Parquet file of groups."""
    return _as_groups(_read_table(path))


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard's table. Raises BonbonError for an unknown schema version."""
    with _opened(path) as file:
        _provenance(path, file.schema_arrow.metadata)
        return file.read(columns)


def _as_groups(table: pa.Table) -> Groups:
    provenance = json.loads(table.schema.metadata[_METADATA_KEY])["provenance"]
    return Groups([Group.from_row(row) for row in table.to_pylist()], provenance)


def shard_provenance(path: Path) -> dict[str, Any]:
    """Read a shard's provenance without its groups. Raises BonbonError as `read_shard` does."""
    with _opened(path) as file:
        return _provenance(path, file.schema_arrow.metadata)


def _provenance(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    record = json.loads((metadata or {}).get(_METADATA_KEY, b"{}"))
    if record.get("schema_version") != SCHEMA_VERSION:
        raise BonbonError(
            f"{path} holds no groups of schema version {SCHEMA_VERSION} "
            f"(its version is {record.get('schema_version')}); make it again with `bonbon sample`"
        )
    return dict(record["provenance"])


def shard_rows(path: Path) -> int:
    """Return the number of groups in a shard without reading them."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with reached(path, "read"), path.open("rb") as source, pq.ParquetFile(source) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise BonbonError(f"cannot read {path} as Parquet: {error}") from error


def iter_shards(folder: Path) -> Iterator[Groups]:
    """Yield each shard of a data set; the next few are read in advance."""
    return map(_as_groups, in_turn(_read_table, shard_paths(folder)))


def iter_provenance(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each shard's provenance."""
    return in_turn(shard_provenance, shard_paths(folder))


def read_groups(folder: Path | str) -> Groups:
    """Read a whole data set. Raises BonbonError when there is none, or when an id occurs twice."""
    stored = open_groups(folder)
    return Groups(list(stored), stored.provenance)


def open_groups(folder: Path | str) -> StoredGroups:
    """Open a data set of any size to iterate over; only its ids are read at once.

    Raises BonbonError when there is none, or when an id occurs twice.
    """
    place = storage_path(folder)
    paths = shard_paths(place)
    if not paths:
        raise BonbonError(f"no groups in {folder}: it has no shard-*.parquet files")
    _check_ids(folder, paths)
    return StoredGroups(place, shard_provenance(paths[0]))


@dataclass(frozen=True)
class StoredGroups(Iterable[Group]):
    """The groups of a folder, or those that `wanted` accepts; a few shards are in memory at a time.

    Iterating raises BonbonError when a shard cannot be read.
    """

    folder: Path
    provenance: Mapping[str, Any]
    wanted: Callable[[Group], bool] | None = None

    def __iter__(self) -> Iterator[Group]:
        for shard in iter_shards(self.folder):
            yield from filter(self.wanted, shard) if self.wanted else shard


def _check_ids(folder: Path | str, paths: Iterable[Path]) -> None:
    tables = in_turn(partial(_read_table, columns=["prompt_id"]), paths)
    ids = pa.chunked_array([ids for it in tables for ids in it["prompt_id"].chunks], pa.string())
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise BonbonError(f"prompt_id {twice!r} occurs twice in {folder}")
