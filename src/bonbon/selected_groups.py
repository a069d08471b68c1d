"""Selected groups in an Arrow file that all processes of a machine map into memory.

The pages of a mapped file are the operating system's to read and to drop, and the processes share
them. So what a process itself holds of a group is its figures (`ref_logps`, `shapes`), and not its
tokens.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from bonbon.selection import SelectedGroup
from bonbon.storage import cannot_write

_CHUNK = 1000  # groups a record batch
_TOLD_APART_BY = ("prompt_id", "prompt_token_ids", "completions")
_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(pa.list_(pa.int32()))),
        ("ref_logps", pa.list_(pa.float64())),
        ("rewards", pa.list_(pa.float64())),
    ]
)


def write_selected(groups: Iterable[SelectedGroup], path: Path) -> int:
    """Write groups to a file that `SelectedGroups` opens, a chunk in memory at a time; how many.

    Raises BonbonError when the file cannot be written.
    """
    upcoming = iter(groups)
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            while chunk := list(islice(upcoming, _CHUNK)):
                writer.write_batch(pa.RecordBatch.from_pylist([*map(vars, chunk)], schema=_SCHEMA))
                count += len(chunk)
    except OSError as error:
        raise cannot_write(path, error) from error
    return count


class SelectedGroups(Sequence[SelectedGroup]):
    """G groups of m selected completions each, in a file that `write_selected` wrote.

    Once it is open its file may be removed.

    Attributes:
        ref_logps: (G, m) float64, nats; what is written here is what the groups have from then on.
        shapes: (G, 3) int32: a group's tokens of the prompt, its completions, and the tokens of the
            longest completion.
    """

    def __init__(self, path: Path) -> None:
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
        found = self._batches[batch].slice(row, 1)
        return SelectedGroup(
            prompt_id=found["prompt_id"][0].as_py(),
            prompt_token_ids=_numbers(found["prompt_token_ids"][0].values),
            completions=tuple(_numbers(it.values) for it in found["completions"][0].values),
            ref_logps=tuple(self.ref_logps[index].tolist()),
            rewards=_numbers(found["rewards"][0].values),
        )

    def __iter__(self) -> Iterator[SelectedGroup]:
        return map(self.__getitem__, range(len(self)))

    def digest(self) -> str:
        """What tells these groups, and their order, from others: not by their figures."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._batches:
            for name in _TOLD_APART_BY:
                for buffer in batch[name].buffers():
                    digest.update(buffer or b"")
        return digest.hexdigest()


def _square(column: Any) -> np.ndarray[Any, Any]:
    """A column of lists of one length as an array of two dimensions."""
    return column.values.to_numpy().reshape(len(column), -1).copy()


def _shapes(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
    prompts = np.diff(batch["prompt_token_ids"].offsets.to_numpy())
    completions = batch["completions"]
    lengths = np.diff(completions.values.offsets.to_numpy()).reshape(len(batch), -1)
    counts = np.full(len(batch), lengths.shape[1])
    return np.stack([prompts, counts, lengths.max(axis=1)], axis=1).astype(np.int32)


def _numbers(values: Any) -> tuple[Any, ...]:
    """An array's values; by way of numpy, which is ten times as fast as Arrow's own."""
    return tuple(values.to_numpy().tolist())
