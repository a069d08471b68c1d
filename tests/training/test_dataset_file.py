"""Groups in a file that processes map are the groups that were written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonbon.objectives.selection import SelectedGroup
from bonbon.system.errors import BonbonError
from bonbon.training.dataset_file import SelectedGroups, write_selected

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
figure = st.floats(allow_nan=False)


def selected(m: int) -> st.SearchStrategy[list[SelectedGroup]]:
    """Groups of m completions, empty completions and prompts among them."""
    figures = st.tuples(*[figure] * m)
    group = st.builds(
        SelectedGroup,
        prompt_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        prompt_token_ids=tokens,
        completions=st.tuples(*[tokens] * m),
        ref_logps=figures,
        rewards=figures,
    )
    return st.lists(group, max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.integers(1, 4).flatmap(selected), chunk=st.integers(1, 9))
def test_what_is_written_is_read(
    groups: list[SelectedGroup], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunks, by any index, and when the file is gone."""
    monkeypatch.setattr("bonbon.training.dataset_file._CHUNK", 5 * chunk)
    path = tmp_path / "sub" / "selected.arrow"
    write_selected(iter(groups), path)
    found = SelectedGroups(path, n=4, tied=0)
    path.unlink()
    assert list(found) == groups
    assert found[::-2] == groups[::-2]
    for index in range(-len(groups), len(groups)):
        assert found[index] == groups[index]
    for index in (len(groups), -len(groups) - 1):
        with pytest.raises(IndexError):
            found[index]
    assert list(map(tuple, found.shapes.tolist())) == [
        (len(it.prompt_token_ids), len(it.completions), max(map(len, it.completions)))
        for it in groups
    ]
    assert [tuple(row) for row in found.ref_logps.tolist()] == [it.ref_logps for it in groups]


GROUPS = [
    SelectedGroup(f"p{i}", (1, i), ((3,) * i, (4,)), (-1.0 * i, -2.0), (0.5, 0.25))
    for i in range(5)
]


def opened(groups: Sequence[SelectedGroup], folder: Path) -> SelectedGroups:
    write_selected(groups, folder / "selected.arrow")
    return SelectedGroups(folder / "selected.arrow", n=4, tied=0)


def test_new_log_probabilities(tmp_path: Path) -> None:
    found = opened(GROUPS, tmp_path)
    found.ref_logps[3] = [7.0, 8.0]
    assert found[3].ref_logps == (7.0, 8.0)
    assert found[3].rewards == GROUPS[3].rewards
    assert found[2] == GROUPS[2]
    assert opened(GROUPS, tmp_path)[3] == GROUPS[3]  # the file is as it was


def test_a_digest_tells_tokens_and_order_but_no_figures(tmp_path: Path) -> None:
    digest = opened(GROUPS, tmp_path).digest()
    first, second, *rest = GROUPS
    figures = SelectedGroup(*list(vars(first).values())[:3], (9.0, 9.0), (9.0, 9.0))
    assert opened([figures, second, *rest], tmp_path).digest() == digest
    tokens = SelectedGroup("p0", (1, 0), ((), (5,)), (0.0, -2.0), (0.5, 0.25))
    moved = SelectedGroup("p0", (1, 0), ((4,), ()), (0.0, -2.0), (0.5, 0.25))
    name = SelectedGroup("q0", *list(vars(first).values())[1:])
    prompt = SelectedGroup("p0", (1, 9), *list(vars(first).values())[2:])
    swapped = [[it, second, *rest] for it in (tokens, moved, name, prompt)]
    for other in (*swapped, [second, first, *rest], rest):
        assert opened(other, tmp_path).digest() != digest


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BonbonError, match=r"cannot write .*choose a folder that can be written"):
        write_selected(GROUPS, tmp_path / "file" / "selected.arrow")


def test_what_the_groups_raise_is_not_the_file_s_fault(tmp_path: Path) -> None:
    def broken() -> Iterator[SelectedGroup]:
        yield GROUPS[0]
        raise ConnectionError("the hub cannot be reached")

    with pytest.raises(ConnectionError, match="the hub"):
        write_selected(broken(), tmp_path / "selected.arrow")


def test_log_probabilities_that_are_not_there(tmp_path: Path) -> None:
    unknown: Any = SelectedGroup("p", (1,), ((2,), (3,)), (None, -1.0), (0.0, 1.0))
    assert np.isnan(opened([unknown], tmp_path).ref_logps[0, 0])


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "selected.arrow").symlink_to("/dev/full")
    with pytest.raises(BonbonError, match=r"cannot write .*No space left .*free some space"):
        write_selected(GROUPS, tmp_path / "selected.arrow")


def test_what_is_mapped_takes_no_memory(tmp_path: Path) -> None:
    """Of the process' own: Arrow allocates nothing, and the arrays have no tokens."""
    ids = np.arange(500)
    rows = (tuple((ids + i).tolist()) for i in range(3000))
    path = tmp_path / "selected.arrow"
    write_selected(
        (SelectedGroup(f"p{i}", (1,), (r, r), (0.0, 0.0), (1.0, 0.0)) for i, r in enumerate(rows)),
        path,
    )
    before = pa.total_allocated_bytes()
    found = SelectedGroups(path, n=4, tied=0)
    assert sum(group.completions[1][-1] for group in found) == sum(range(499, 3499))
    size = path.stat().st_size
    assert size > 3000 * 4000
    assert pa.total_allocated_bytes() - before < size / 100
    assert found.ref_logps.nbytes + found.shapes.nbytes < size / 50
