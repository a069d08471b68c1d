"""Groups: the one data format that every stage reads or writes.

A `Group` is one prompt with its n completions, their token ids, log-probabilities and rewards. On
disk a data set is a folder of Parquet shards, `shard-00000.parquet` and so on, that
`datasets.load_dataset("parquet", data_files="FOLDER/*.parquet")` opens as it is. The schema's
version and the provenance (model, revision, sampling settings, reward) are JSON under the key
`bonbon` of each file's metadata.

| column | type | meaning |
|---|---|---|
| `prompt_id` | string | unique in the data set |
| `prompt` | string, or list of {role, content} | as the user gave it |
| `prompt_token_ids` | list of int32 | what the model was conditioned on |
| `completions` | list of string | decoded text, special tokens left out |
| `token_ids` | list of list of int32 | the drawn tokens, the end token included where it was drawn; −1 each where a server told only their number |
| `logprobs` | list of double | log-probability of each completion's drawn tokens under the model and the sampling settings in the provenance, summed (nats) |
| `rewards` | list of double, or null | null until scored |
| `finish_reasons` | list of string | `stop` (the end token was drawn, or a stop string), `length`, or `rejected` (a strategy gave the completion up) |
| `metrics` | list of {name, values: list of double} | further figures, one a completion: a second reward, KL |
"""  # noqa: E501 (a table row cannot be broken)

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bonbon.ahead import in_turn
from bonbon.errors import BonbonError
from bonbon.files import atomic_path
from bonbon.storage import is_remote, reached, storage_path

SCHEMA_VERSION = 1
_METADATA_KEY = b"bonbon"

Message = dict[str, str]
Prompt = str | list[Message]


def as_text(prompt: Prompt) -> str:
    """A prompt as one text: that of its only message, or line by line as `role: content`."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Group:
    """One prompt and its n completions; all per-completion tuples have length n.

    Raises ValueError when the lengths differ.
    """

    prompt_id: str
    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    completions: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]
    finish_reasons: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, Sequence[Any]] = {
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "finish_reasons": self.finish_reasons,
            **self.metrics,
        }
        if self.rewards is not None:
            columns["rewards"] = self.rewards
        for name, values in columns.items():
            if len(values) != self.n:
                raise ValueError(
                    f"group {self.prompt_id}: {len(values)} {name} for {self.n} completions"
                )

    @property
    def n(self) -> int:
        """The number of completions."""
        return len(self.completions)

    def lengths(self) -> tuple[int, ...]:
        """Each completion's length in tokens, a drawn end token included."""
        return tuple(len(ids) for ids in self.token_ids)

    def part(self, start: int, stop: int) -> Group:
        """The group of the completions start..stop−1."""
        return self.take(range(self.n)[start:stop])

    def take(self, indices: Sequence[int]) -> Group:
        """The group of these completions, in this order; repeats are allowed."""
        return replace(
            self,
            completions=tuple(self.completions[i] for i in indices),
            token_ids=tuple(self.token_ids[i] for i in indices),
            logprobs=tuple(self.logprobs[i] for i in indices),
            finish_reasons=tuple(self.finish_reasons[i] for i in indices),
            rewards=None if self.rewards is None else tuple(self.rewards[i] for i in indices),
            metrics={name: tuple(v[i] for i in indices) for name, v in self.metrics.items()},
        )

    def with_rewards(self, rewards: Iterable[float]) -> Group:
        """The same group, scored."""
        return replace(self, rewards=tuple(float(reward) for reward in rewards))

    def with_metric(self, name: str, values: Iterable[float]) -> Group:
        """The same group with one more figure per completion."""
        figures = tuple(float(value) for value in values)
        return replace(self, metrics={**self.metrics, name: figures})

    def to_row(self) -> dict[str, Any]:
        """The group as a row of the Parquet table."""
        return {
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "completions": self.completions,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "rewards": self.rewards,
            "finish_reasons": self.finish_reasons,
            "metrics": [{"name": k, "values": values} for k, values in self.metrics.items()],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Group:
        """A group from a row of the Parquet table (or of `datasets.Dataset`)."""
        rewards = row.get("rewards")
        return cls(
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            prompt_token_ids=tuple(row["prompt_token_ids"]),
            completions=tuple(row["completions"]),
            token_ids=tuple(tuple(ids) for ids in row["token_ids"]),
            logprobs=tuple(row["logprobs"]),
            finish_reasons=tuple(row["finish_reasons"]),
            rewards=None if rewards is None else tuple(rewards),
            metrics={item["name"]: tuple(item["values"]) for item in row.get("metrics") or []},
        )


def joined(groups: Sequence[Group]) -> Group:
    """Scored groups of one prompt as one, in this order; metrics are left out."""
    return replace(
        groups[0],
        completions=tuple(text for group in groups for text in group.completions),
        token_ids=tuple(ids for group in groups for ids in group.token_ids),
        logprobs=tuple(logprob for group in groups for logprob in group.logprobs),
        finish_reasons=tuple(reason for group in groups for reason in group.finish_reasons),
        rewards=tuple(reward for group in groups for reward in group.rewards or ()),
        metrics={},
    )


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
    """Where shard `index` of a data set lies."""
    return folder / f"shard-{index:05d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    """The finished shards of a data set, in order."""
    with reached(folder, "read"):
        if is_remote(folder) and not folder.is_dir():  # object stores have no empty folders
            return []
        return sorted(folder.glob("shard-*.parquet"))


def shard_indices(folder: Path) -> list[int]:
    """The indices of the finished shards of a data set, ascending."""
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
    """A shard's table, its provenance read and looked at."""
    with _opened(path) as file:
        _provenance(path, file.schema_arrow.metadata)
        return file.read(columns)


def _as_groups(table: pa.Table) -> Groups:
    provenance = json.loads(table.schema.metadata[_METADATA_KEY])["provenance"]
    return Groups([Group.from_row(row) for row in table.to_pylist()], provenance)


def shard_provenance(path: Path) -> dict[str, Any]:
    """A shard's provenance, without reading its groups. Raises BonbonError as `read_shard` does."""
    with _opened(path) as file:
        return _provenance(path, file.schema_arrow.metadata)


def _provenance(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    record = json.loads((metadata or {}).get(_METADATA_KEY, b"{}"))
    if record.get("schema_version") != SCHEMA_VERSION:
        raise BonbonError(
            f"{path} holds no groups of schema version {SCHEMA_VERSION} "
            f"(found {record.get('schema_version')}); make it again with `bonbon sample`"
        )
    return dict(record["provenance"])


def shard_rows(path: Path) -> int:
    """The number of groups in a shard, without reading them."""
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
    """Each shard of a data set in turn; the tables of a few are read ahead."""
    return map(_as_groups, in_turn(_read_table, shard_paths(folder)))


def iter_provenance(folder: Path) -> Iterator[dict[str, Any]]:
    """Each shard's provenance in turn."""
    return in_turn(shard_provenance, shard_paths(folder))


def read_groups(folder: Path | str) -> Groups:
    """Read a whole data set. Raises BonbonError when there is none, or when an id occurs twice."""
    stored = open_groups(folder)
    return Groups(list(stored), stored.provenance)


def open_groups(folder: Path | str) -> StoredGroups:
    """A data set of any size, to iterate over; of its groups the ids alone are read before.

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
    """The groups of a folder, or those that `wanted` takes; a few shards are in memory at a time.

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


class Groups(Sequence[Group]):
    """A read-only sequence of groups with the provenance they were stored with."""

    def __init__(self, groups: Sequence[Group], provenance: Mapping[str, Any] | None = None):
        self._groups = list(groups)
        self.provenance: dict[str, Any] = dict(provenance or {})

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Groups: ...
    def __getitem__(self, index: int | slice) -> Group | Groups:
        if isinstance(index, slice):
            return Groups(self._groups[index], self.provenance)
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)
