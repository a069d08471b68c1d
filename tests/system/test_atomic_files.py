"""A file is the old one or the new one, never something between."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bonbon.system.atomic_files import (
    atomic_path,
    beside,
    read_json,
    remove_torn,
    write_json,
    write_text,
)
from bonbon.system.errors import BonbonError


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old " * 1000)
    with path.open() as reader:
        assert reader.read(4) == "old "
        write_text(path, "new")  # another file of that name, not the same one written over
        assert reader.read(4) == "old "
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Whoever comes last: a reader finds the text of one of them, whole."""
    path = tmp_path / "file"
    texts = {letter * 200_000 for letter in "ab"}
    write_text(path, min(texts))
    with ThreadPoolExecutor(2) as pool:
        writers = [
            pool.submit(lambda text: [write_text(path, text) for _ in range(100)], text)
            for text in texts
        ]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
    for writer in writers:
        writer.result()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for kept in ("a.txt", "b.tmp", ".hidden"):
        (tmp_path / kept).write_text("")
    for torn in (beside(tmp_path / "a.txt"), beside(tmp_path / "deep" / "shard.parquet")):
        torn.parent.mkdir(exist_ok=True)
        torn.write_text("half")
    model = beside(tmp_path / "model")
    model.mkdir()
    (model / "weights").write_text("half")
    remove_torn(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"a.txt", "b.tmp", ".hidden", "deep"}


def test_json_is_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"ü": [1, 2.5, None]})
    assert read_json(path) == {"ü": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert read_json(path) == {"ü": [1, 2.5, None]}
    path.write_text('{"torn": ')
    with pytest.raises(BonbonError, match=r"cannot read .*file\.json"):
        read_json(path)
