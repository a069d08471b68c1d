"""Groups: the one data format that every stage reads or writes.

A `Group` is one prompt with its n completions, their token ids, log-probabilities and rewards. On
disk a data set is a folder of Parquet shards, `shard-00000.parquet` and so on, that
`datasets.load_dataset("parquet", data_files="FOLDER/*.parquet")` can open. The schema's
version and the provenance (model, revision, sampling settings, reward) are JSON under the key
`bonbon` of each file's metadata.

| column | type | meaning |
|---|---|---|
| `prompt_id` | string | unique in the data set |
| `prompt` | string, or list of {role, content} | as the user gave it |
| `prompt_token_ids` | list of int32 | what the model was conditioned on |
| `completions` | list of string | decoded text, special tokens left out |
| `token_ids` | list of list of int32 | the drawn tokens, the end token included where it was drawn; −1 each where a server reported only their number |
| `logprobs` | list of double | log-probability of each completion's drawn tokens under the model and the sampling settings in the provenance, summed (nats) |
| `rewards` | list of double, or null | null until scored |
| `finish_reasons` | list of string | `stop` (the end token was drawn, or a stop string), `length`, or `rejected` (a strategy dropped the completion before its end) |
| `metrics` | list of {name, values: list of double} | further figures, one for each completion: a second reward, KL |
"""  # noqa: E501 (a table row cannot be broken)

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.groups.group import Group as Group
    from bonbon.groups.group import Groups as Groups
    from bonbon.groups.group import Message as Message
    from bonbon.groups.group import Prompt as Prompt
    from bonbon.groups.group import as_text as as_text
    from bonbon.groups.group import joined as joined
    from bonbon.groups.shards import SCHEMA_VERSION as SCHEMA_VERSION
    from bonbon.groups.shards import StoredGroups as StoredGroups
    from bonbon.groups.shards import iter_provenance as iter_provenance
    from bonbon.groups.shards import iter_shards as iter_shards
    from bonbon.groups.shards import open_groups as open_groups
    from bonbon.groups.shards import read_groups as read_groups
    from bonbon.groups.shards import read_shard as read_shard
    from bonbon.groups.shards import shard_indices as shard_indices
    from bonbon.groups.shards import shard_path as shard_path
    from bonbon.groups.shards import shard_paths as shard_paths
    from bonbon.groups.shards import shard_provenance as shard_provenance
    from bonbon.groups.shards import shard_rows as shard_rows
    from bonbon.groups.shards import write_shard as write_shard

_HOMES = {
    "Group": "group",
    "Groups": "group",
    "Message": "group",
    "Prompt": "group",
    "SCHEMA_VERSION": "shards",
    "StoredGroups": "shards",
    "as_text": "group",
    "iter_provenance": "shards",
    "iter_shards": "shards",
    "joined": "group",
    "open_groups": "shards",
    "read_groups": "shards",
    "read_shard": "shards",
    "shard_indices": "shards",
    "shard_path": "shards",
    "shard_paths": "shards",
    "shard_provenance": "shards",
    "shard_rows": "shards",
    "write_shard": "shards",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
