"""The data format on disk."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonbon.groups import shards as groups_module
from bonbon.groups.group import Group, Groups
from bonbon.groups.shards import open_groups, read_groups, shard_path, shard_paths, write_shard
from bonbon.system.atomic_files import write_text
from bonbon.system.errors import BonbonError
from bonbon.system.prefetch import AHEAD
from support.groups import MakeGroup

PROVENANCE = {"model": "models/tiny", "revision": None, "sampling": {"n": 3, "top_p": 0.9}}
CHAT = [
    {"role": "system", "content": "Du bist höflich."},
    {"role": "user", "content": "Wie geht's? 🐈\n„gut“"},
]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts})


@st.composite
def group_lists(draw: st.DrawFn) -> list[Group]:
    """Groups of a data set: all of text prompts or all of chat prompts."""
    prompts = texts if draw(st.booleans()) else st.lists(messages, min_size=1, max_size=3)

    def group(prompt_id: str) -> Group:
        n = draw(st.integers(1, 4))

        def per_completion(values: st.SearchStrategy[Any]) -> Any:
            return draw(st.lists(values, min_size=n, max_size=n).map(tuple))

        names = draw(st.lists(texts, max_size=2, unique=True))
        return Group(
            prompt_id=prompt_id,
            prompt=draw(prompts),
            prompt_token_ids=draw(tokens),
            completions=per_completion(texts),
            token_ids=per_completion(tokens),
            logprobs=per_completion(floats),
            finish_reasons=per_completion(st.sampled_from(["stop", "length"])),
            rewards=per_completion(floats) if draw(st.booleans()) else None,
            metrics={name: per_completion(floats) for name in names},
        )

    return [group(name) for name in draw(st.lists(texts, min_size=1, max_size=3, unique=True))]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(groups=group_lists())
def test_groups_survive_the_disk(groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(shard_path(folder, 0), groups, PROVENANCE)
        found = read_groups(folder)
    assert list(found) == groups
    assert found.provenance == PROVENANCE


def varied_groups(make_group: MakeGroup, chat: bool) -> list[Group]:
    """Groups with unicode, an empty completion, with and without rewards and metrics."""
    prompt = CHAT if chat else "Es war einmal 🐈\n„x“"
    scored = make_group("scored", prompt, ["ä", "", "日本"], rewards=(1.0, -2.5, 0.0))
    scored = scored.with_metric("kl", [0.25, 0.0, 3.0])
    return [make_group("raw", prompt), scored]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_datasets_opens_the_shards_as_they_are(
    make_group: MakeGroup, tmp_path: Path, chat: bool
) -> None:
    groups = varied_groups(make_group, chat)
    for index, group in enumerate(groups):
        write_shard(shard_path(tmp_path / "data", index), [group], PROVENANCE)
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "data" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows.column_names == list(groups[0].to_row())
    assert [Group.from_row(row) for row in rows] == groups


def test_metadata_has_the_schema_version_and_the_provenance(
    make_group: MakeGroup, tmp_path: Path
) -> None:
    path = shard_path(tmp_path, 0)
    write_shard(path, [make_group()], PROVENANCE)
    assert json.loads(pq.read_schema(path).metadata[b"bonbon"]) == {
        "schema_version": 1,
        "provenance": PROVENANCE,
    }


def test_shards_are_read_in_order_and_slices_keep_the_provenance(
    make_group: MakeGroup, tmp_path: Path
) -> None:
    for index in (10, 2, 0):
        write_shard(shard_path(tmp_path, index), [make_group(f"p{index}")], PROVENANCE)
    found = read_groups(tmp_path)
    assert [group.prompt_id for group in found] == ["p0", "p2", "p10"]
    assert isinstance(found[1:], Groups)
    assert found[1:].provenance == PROVENANCE


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_midway_leaves_nothing(
    make_group: MakeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1 half a sh")
        raise KeyboardInterrupt

    monkeypatch.setattr(groups_module.pq, "write_table", torn)
    with pytest.raises(KeyboardInterrupt):
        write_shard(shard_path(tmp_path, 0), [make_group()], PROVENANCE)
    assert files_in(tmp_path) == []


def test_a_write_that_fails_leaves_the_earlier_shard(
    make_group: MakeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    path = shard_path(tmp_path, 0)
    write_shard(path, [make_group("old")], PROVENANCE)
    monkeypatch.setattr(groups_module.pq, "write_table", full)
    with pytest.raises(BonbonError, match=r"shard-00000\.parquet: No space left on device"):
        write_shard(path, [make_group("new")], PROVENANCE)
    assert files_in(tmp_path) == [path.name]
    assert read_groups(tmp_path)[0].prompt_id == "old"


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BonbonError, match=r"cannot write .*file/below"):
        write_text(tmp_path / "file" / "below", "text")


def test_one_id_twice_is_refused(make_group: MakeGroup, tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [make_group("a"), make_group("twin")], PROVENANCE)
    write_shard(shard_path(tmp_path, 1), [make_group("twin")], PROVENANCE)
    with pytest.raises(BonbonError, match="prompt_id 'twin' occurs twice"):
        read_groups(tmp_path)


def test_open_groups_are_read_while_they_are_taken(
    make_group: MakeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(AHEAD + 3):
        shard = [make_group(f"p{index}{k}") for k in range(2)]
        write_shard(shard_path(tmp_path, index), shard, PROVENANCE | {"shard": index})
    found = open_groups(tmp_path)
    assert found.provenance == PROVENANCE | {"shard": 0}
    assert list(found) == list(found) == list(read_groups(tmp_path))
    last = replace(found, wanted=lambda group: group.prompt_id[-1] == "1")
    assert [group.prompt_id for group in last] == [f"p{i}1" for i in range(AHEAD + 3)]
    made = 0

    def counted(table: pa.Table) -> Groups:
        nonlocal made
        made += 1
        return as_groups(table)

    as_groups = groups_module._as_groups
    monkeypatch.setattr(groups_module, "_as_groups", counted)
    for taken, _ in enumerate(found):
        assert made == taken // 2 + 1


def test_a_stranger_among_the_shards_is_refused(make_group: MakeGroup, tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [make_group("a")], PROVENANCE)
    pq.write_table(pa.table({"text": ["not ours"]}), shard_path(tmp_path, 1))
    with pytest.raises(BonbonError, match=r"shard-00001\.parquet holds no groups"):
        open_groups(tmp_path)


def test_text_and_chat_prompts_do_not_mix(make_group: MakeGroup, tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"shard-00000\.parquet: .* not both"):
        write_shard(shard_path(tmp_path, 0), [make_group("a"), make_group("b", CHAT)], {})
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "found"),
    [({b"bonbon": b'{"schema_version": 99, "provenance": {}}'}, "99"), ({}, "None")],
    ids=["newer", "none"],
)
def test_another_schema_version_is_refused(
    make_group: MakeGroup, tmp_path: Path, metadata: dict[bytes, bytes], found: str
) -> None:
    path = shard_path(tmp_path, 0)
    write_shard(path, [make_group()], PROVENANCE)
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(BonbonError, match=rf"schema version 1 \(its version is {found}\)"):
        read_groups(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 torn", b"not Parquet at all, but long enough"])
def test_what_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    shard_path(tmp_path, 0).write_bytes(content)
    with pytest.raises(BonbonError, match=r"cannot read .*shard-00000\.parquet as Parquet"):
        read_groups(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.parquet").write_bytes(b"")
    assert shard_paths(tmp_path) == []
    with pytest.raises(BonbonError, match="it has no shard"):
        read_groups(tmp_path)


@pytest.mark.parametrize("column", ["token_ids", "logprobs", "finish_reasons", "rewards"])
def test_columns_of_unequal_length_are_refused(make_group: MakeGroup, column: str) -> None:
    with pytest.raises(ValueError, match=f"group p: 1 {column} for 3 completions"):
        make_group("p", completions=["a", "b", "c"], **{column: (0,)})


def test_metrics_of_another_length_are_refused(make_group: MakeGroup) -> None:
    with pytest.raises(ValueError, match="group p: 2 kl for 3 completions"):
        make_group("p", completions=["a", "b", "c"]).with_metric("kl", [0.0, 1.0])


def test_lengths_count_the_end_token(make_group: MakeGroup) -> None:
    assert make_group(completions=["a", ""], token_ids=((5, 6, 2), (2,))).lengths() == (3, 1)
