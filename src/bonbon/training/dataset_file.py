"""Selected groups in an Arrow file that all processes of a machine map into memory.

The operating system reads and drops the pages of a mapped file, and processes share them. So each
process holds only the figures of a group (`ref_logps`, `shapes`), not its tokens.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from bonbon.objectives.selection import SelectedGroup
from bonbon.system.storage import cannot_write

_CHUNK = 2**18  # tokens in a record batch
_COMPARED = ("prompt_id", "prompt_token_ids", "completions")  # by a digest
_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(pa.list_(pa.int32()))),
        ("ref_logps", pa.list_(pa.float64())),
        ("rewards", pa.list_(pa.float64())),
    ]
)


def write_selected(groups: Iterable[SelectedGroup], path: Path) -> None:
    """Write groups to a file that `SelectedGroups` opens, with one chunk in memory at a time.

    Raises BonbonError when the file cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = pa.OSFile(str(path), "wb")
        writer = pa.ipc.new_file(sink, _SCHEMA)
    try:
        for chunk in _chunks(groups):
            with _writing(path):
                writer.write_batch(_batch(chunk))
    finally:
        with _writing(path), sink:
            writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _chunks(groups: Iterable[SelectedGroup]) -> Iterator[list[SelectedGroup]]:
    """Yield lists of groups with about `_CHUNK` tokens together; a larger group is alone."""
    chunk: list[SelectedGroup] = []
    tokens = 0
    for group in groups:
        chunk.append(group)
        tokens += 1 + len(group.prompt_token_ids) + sum(map(len, group.completions))
        if tokens >= _CHUNK:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _batch(groups: Sequence[SelectedGroup]) -> pa.RecordBatch:
    completions = [ids for group in groups for ids in group.completions]
    columns = [
        pa.array([group.prompt_id for group in groups], pa.string()),
        _lists([group.prompt_token_ids for group in groups], np.int32),
        pa.ListArray.from_arrays(
            _offsets([group.completions for group in groups]), _lists(completions, np.int32)
        ),
        # None, which Parquet may contain, becomes NaN.
        _lists([group.ref_logps for group in groups], np.float64),
        _lists([group.rewards for group in groups], np.float64),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _lists(rows: Sequence[Sequence[Any]], dtype: type) -> pa.ListArray:
    """Convert rows of numbers to a column, by numpy, which is faster than Arrow's own code."""
    flat = pa.array(np.array([value for row in rows for value in row], dtype=dtype))
    return pa.ListArray.from_arrays(_offsets(rows), flat)


def _offsets(rows: Sequence[Sequence[Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())


class SelectedGroups(Sequence[SelectedGroup]):
    """G selected groups of m completions each, mapped from a file that `write_selected` wrote.

    The file may be removed once it is open.

    Attributes:
        n: the completions that each group had before the selector.
        tied: the groups that were left out because their rewards tie.
        ref_logps: (G, m) float64, nats. Values written here are those that the groups then have.
        shapes: (G, 3) int32: of each group the tokens of the prompt, the completions, and the
            tokens of the longest completion.
    """

    def __init__(self, path: Path, *, n: int, tied: int) -> None:
        self.n = n
        self.tied = tied
        with pa.memory_map(str(path)) as source:
            self._batches = pa.ipc.open_file(source).read_all().to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64).tolist()
        self.ref_logps = np.concatenate(
            [_square(batch["ref_logps"]) for batch in self._batches] or [np.zeros((0, 0))]
        )
        self.shapes = np.concatenate(
            [_shapes(batch) for batch in self._batches] or [np.zeros((0, 3), dtype=np.int32)]
        )

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> SelectedGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[SelectedGroup]: ...
    def __getitem__(self, index: int | slice) -> SelectedGroup | list[SelectedGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        batch = bisect_right(self._ends, index)
        row = index - (self._ends[batch - 1] if batch else 0)
        columns = self._batches[batch].slice(row, 1)
        return SelectedGroup(
            prompt_id=columns["prompt_id"][0].as_py(),
            prompt_token_ids=_numbers(columns["prompt_token_ids"][0].values),
            completions=tuple(_numbers(ids.values) for ids in columns["completions"][0].values),
            ref_logps=tuple(self.ref_logps[index].tolist()),
            rewards=_numbers(columns["rewards"][0].values),
        )

    def __iter__(self) -> Iterator[SelectedGroup]:
        return map(self.__getitem__, range(len(self)))

    def digest(self) -> str:
        """Return a digest of the prompts and completions in their order, without the figures."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._batches:
            for name in _COMPARED:
                for buffer in batch[name].buffers():
                    digest.update(buffer or b"")
        return digest.hexdigest()


def _square(column: Any) -> np.ndarray[Any, Any]:
    """Convert a column of lists of one length to an array of two dimensions."""
    return column.values.to_numpy().reshape(len(column), -1).copy()


def _shapes(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
    prompts = np.diff(batch["prompt_token_ids"].offsets.to_numpy())
    completions = batch["completions"]
    lengths = np.diff(completions.values.offsets.to_numpy()).reshape(len(batch), -1)
    counts = np.full(len(batch), lengths.shape[1])
    return np.stack([prompts, counts, lengths.max(axis=1)], axis=1).astype(np.int32)


def _numbers(values: Any) -> tuple[Any, ...]:
    """Return an array's values, by numpy, which is ten times as fast as Arrow's own code."""
    return tuple(values.to_numpy().tolist())
