"""Reading prompts from files."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonbon.groups.prompts import PromptRow, is_held_out, read_prompts
from bonbon.system.errors import BonbonError

CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi, “du”"}]


def jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def complaint(path: Path, content: bytes | str | None = None, **options: Any) -> str:
    """What is said of a file, which must name it."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BonbonError) as caught:
        read_prompts(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the file types -------------------------------------------------------------------------------


def test_jsonl_gives_texts_and_chats_as_they_are(tmp_path: Path) -> None:
    texts = jsonl(tmp_path / "t.jsonl", [{"prompt": " a\n "}, {"prompt_id": 7, "prompt": "ü🐈"}])
    assert read_prompts(texts) == [PromptRow("row-1", " a\n "), PromptRow("7", "ü🐈")]
    chats = jsonl(tmp_path / "c.NDJSON", [{"prompt_id": "c", "prompt": CHAT, "other": [1]}])
    assert read_prompts(chats) == [PromptRow("c", CHAT)]


def test_jsonl_passes_over_blank_lines_and_keeps_line_separators_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a\u2028b"}\r\n   \n{"prompt": "c"}', encoding="utf-8")
    assert read_prompts(path) == [PromptRow("row-2", "a\u2028b"), PromptRow("row-4", "c")]


def test_csv_fields_may_hold_quotes_commas_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'id,text\r\n1,"say ""hi"",\nplease"\r\n2,plain\r\n')
    assert read_prompts(path, "text", "id") == [
        PromptRow("1", 'say "hi",\nplease'),
        PromptRow("2", "plain"),
    ]


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("Erzähl \r\n\n  zwei".encode())
    assert read_prompts(path) == [PromptRow("row-1", "Erzähl "), PromptRow("row-3", "  zwei")]


@pytest.mark.parametrize("prompt", ["text 🐈", CHAT], ids=["text", "chat"])
def test_parquet_holds_texts_or_chats(tmp_path: Path, prompt: Any) -> None:
    path = tmp_path / "p.parquet"
    rows = [{"prompt_id": i, "prompt": prompt, "split": "ab"[i % 2]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    assert read_prompts(path, split="b") == [PromptRow("1", prompt), PromptRow("3", prompt)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", '{"prompt": "ä"}\n'), ("p.csv", "prompt\nä\n"), ("p.txt", "ä\n")],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_prompts(tmp_path / name) == [PromptRow("row-1", "ä")]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip())


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(prompts=st.lists(texts, min_size=1, max_size=4))
def test_texts_survive_jsonl_csv_and_parquet(prompts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jsonl(folder / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
        pq.write_table(pa.table({"prompt": prompts}), folder / "p.parquet")
        paths = [folder / "p.jsonl", folder / "p.parquet"]
        if not any("\0" in prompt for prompt in prompts):  # which CSV cannot hold
            paths.append(folder / "p.csv")
            with paths[-1].open("w", encoding="utf-8", newline="") as file:
                rows = [["prompt"], *([prompt] for prompt in prompts)]
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
        for path in paths:
            assert [row.prompt for row in read_prompts(path)] == prompts


def test_the_real_csv_is_read_whole(shared: Path) -> None:
    rows = read_prompts(shared / "data" / "hh" / "prompts.csv", column="Prompt")
    assert len(rows) == 2850
    assert len({row.prompt_id for row in rows}) == 2850
    assert any('"' in row.prompt and "\n" in row.prompt for row in rows)


def test_the_real_jsonl_is_read_whole_or_by_split(shared: Path) -> None:
    path = shared / "data" / "stories" / "prompts.jsonl"
    rows = read_prompts(path)
    assert len(rows) == 759
    assert rows[0] == PromptRow("story-0000", "Anna and a dog lived in the")
    parts = [read_prompts(path, split=split) for split in ("train", "eval")]
    assert min(map(len, parts)) > 0
    assert sorted(parts[0] + parts[1], key=lambda row: row.prompt_id) == rows


# --- which rows -----------------------------------------------------------------------------------


def test_a_split_is_taken_and_limited(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "split": "ab"[i % 2]} for i in range(6)]
    path = jsonl(tmp_path / "p.jsonl", records)
    assert [row.prompt for row in read_prompts(path, split="b", limit=2)] == ["p1", "p3"]
    assert [row.prompt_id for row in read_prompts(path, split="b")] == ["row-2", "row-4", "row-6"]
    assert "no prompts with split 'c'" in complaint(path, split="c")


def test_a_limit_stops_reading_before_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert [row.prompt for row in read_prompts(path, limit=2)] == ["a", "b"]


def test_rows_without_an_id_are_numbered(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": p, "prompt_id": None} for p in "ab"])
    assert [row.prompt_id for row in read_prompts(path)] == ["row-1", "row-2"]


# --- what is wrong is named -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "no prompts in the file" in complaint(tmp_path / name, b"")


def test_a_csv_of_only_a_header_is_refused(tmp_path: Path) -> None:
    assert "no prompts in the file" in complaint(tmp_path / "p.csv", "prompt\n")


def test_a_missing_file_and_an_unknown_type_are_refused(tmp_path: Path) -> None:
    assert "No such file" in complaint(tmp_path / "p.jsonl")
    assert "unknown file type; use one of .jsonl" in complaint(tmp_path / "p.xlsx", b"")


@pytest.mark.parametrize(
    ("name", "content", "row", "columns"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b", "n": 1}\n', 2, "text, n"),
        ("p.jsonl", "{}\n", 1, "none"),
        ("p.csv", "Prompt,n\na,1\n", 1, "Prompt, n"),
    ],
)
def test_a_missing_column_is_named_with_those_there(
    tmp_path: Path, name: str, content: str, row: int, columns: str
) -> None:
    said = complaint(tmp_path / name, content)
    assert f"row {row}: no column 'prompt' (columns: {columns}); name it with --prompt-c" in said


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_what_is_not_utf8_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    row = {"p.jsonl": b'{"prompt": "caf%s"}\n', "p.csv": b"caf%s\n", "p.txt": b"caf%s\n"}[name]
    head = b"prompt\n" if name == "p.csv" else b""
    line = 3001 + (name == "p.csv")
    said = complaint(tmp_path / name, head + row % b"e" * 3000 + row % b"\xe9")
    assert f"is not UTF-8 (line {line}, byte {row.index(b'%') + 1})" in said


def test_utf16_is_refused(tmp_path: Path) -> None:
    assert "is not UTF-8 (line 1, byte 1)" in complaint(tmp_path / "p.txt", "a".encode("utf-16"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{'prompt': 'a'}", "not JSON"),
        ('{"prompt": "a', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
    ],
    ids=["quotes", "torn", "deep", "list"],
)
def test_a_broken_json_row_is_named(tmp_path: Path, row: str, said: str) -> None:
    assert f"row 2: {said}" in complaint(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n{row}\n')


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,prompt\n1,a\n2\n", "row 2: fields and header do not match"),
        ("id,prompt\n1,a,b\n", "row 1: fields and header do not match"),
        ('prompt\n"open\n', "broken CSV"),
    ],
)
def test_a_broken_csv_is_named(tmp_path: Path, content: str, said: str) -> None:
    assert said in complaint(tmp_path / "p.csv", content)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"plain text, no Parquet"])
def test_a_broken_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    assert "is not a readable Parquet file" in complaint(tmp_path / "p.parquet", content)


def test_an_id_used_twice_is_named_with_both_rows(tmp_path: Path) -> None:
    records = [{"prompt_id": i, "prompt": "a"} for i in ("x", "y", "x")]
    said = complaint(jsonl(tmp_path / "p.jsonl", records))
    assert "row 3: id 'x' was used by row 1 already" in said


@pytest.mark.parametrize("prompt", ["", " \n\t", []])
def test_an_empty_prompt_is_refused(tmp_path: Path, prompt: Any) -> None:
    said = complaint(jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": prompt}]))
    assert "row 2: " in said


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "a\ud800"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "\udfff"}]}, "prompt"),
        ({"prompt": "a", "prompt_id": "\ud800"}, "id"),
    ],
)
def test_a_lone_surrogate_is_refused(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    said = complaint(jsonl(tmp_path / "p.jsonl", [record]))
    assert f"row 1: the {what} has a lone surrogate" in said


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(r'{"prompt": "\ud83d\udc08"}')
    assert read_prompts(tmp_path / "p.jsonl")[0].prompt == "🐈"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "a prompt is a text or a list of messages, not None"),
        (3, "a prompt is a text or a list of messages, not 3"),
        ({"role": "user", "content": "a"}, "a prompt is a text or a list of messages"),
        (["a"], "not 'a'"),
        ([{"role": "user"}], "a message is"),
        ([{"content": "a"}], "a message is"),
        ([{"role": "human", "content": "a"}], '"role": system|user|assistant|tool'),
        ([{"role": ["user"], "content": "a"}], "a message is"),
        ([{"role": "user", "content": ["a"]}], "a message is"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last"),
    ],
)
def test_a_prompt_of_another_form_is_refused(tmp_path: Path, prompt: Any, said: str) -> None:
    found = complaint(jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}]))
    assert "row 1: " in found
    assert said in found


def test_further_keys_of_a_message_are_left_out(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a", "name": "x"}]
    rows = read_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}]))
    assert rows[0].prompt == [{"role": "user", "content": "a"}]


def test_texts_and_chats_in_one_file_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": CHAT}])
    assert "row 2: a file holds either plain-text or chat prompts" in complaint(path)


# --- holding out ----------------------------------------------------------------------------------


def rows_of(count: int) -> list[PromptRow]:
    return [PromptRow(f"id-{i}", f"prompt {i}") for i in range(count)]


def hold_out(rows: list[PromptRow], fraction: float) -> list[PromptRow]:
    return [row for row in rows if is_held_out(row, fraction)]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_about_the_fraction_is_held_out(fraction: float) -> None:
    rows = rows_of(4000)
    held = hold_out(rows, fraction)
    # Five standard errors of a binomial share.
    assert abs(len(held) / 4000 - fraction) < 5 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_a_split_within_a_split_is_independent_of_it() -> None:
    """Or nothing would be left to hold out of what was not held out before."""
    kept = [row for row in rows_of(4000) if not is_held_out(row, 0.2)]
    held = [row for row in kept if is_held_out(row, 0.2, "another")]
    assert abs(len(held) / len(kept) - 0.2) < 5 * (0.2 * 0.8 / len(kept)) ** 0.5


def test_what_is_held_out_depends_on_the_prompt_alone() -> None:
    rows = rows_of(200)
    held = hold_out(rows, 0.3)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert set(hold_out(shuffled, 0.3)) == set(held)
    assert hold_out(rows[:50], 0.3) == [row for row in held if row in rows[:50]]
    assert set(held) <= set(hold_out(rows, 0.4))
    # Pinned: another version must not evaluate on what this one trained on.
    assert [row.prompt_id for row in hold_out(rows_of(12), 0.3)] == ["id-3", "id-10"]
    renamed = [PromptRow(f"again-{row.prompt_id}", row.prompt) for row in rows]
    assert [row.prompt for row in hold_out(renamed, 0.3)] == [row.prompt for row in held]
