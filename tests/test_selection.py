"""Best and worst of a group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.selection import best_and_worst, select_pairs
from conftest import MakeGroup


def scored(make_group: MakeGroup, name: str, *rewards: float) -> Group:
    return make_group(name, completions=["x"] * len(rewards), rewards=rewards)


@pytest.mark.parametrize(
    ("rewards", "indices"),
    [
        ((0.0, 2.0, -1.0), (1, 2)),
        ((5.0, 1.0), (0, 1)),
        ((1.0, 2.0, 2.0, 1.0), (1, 0)),  # the first drawn of those that share a reward
        ((0.0, -0.0, 0.0), None),
        ((3.0, 3.0), None),
    ],
)
def test_best_and_worst(
    make_group: MakeGroup, rewards: tuple[float, ...], indices: tuple[int, int] | None
) -> None:
    assert best_and_worst(scored(make_group, "p", *rewards)) == indices


@given(rewards=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_best_is_the_maximum_and_worst_the_minimum(
    make_group: MakeGroup, rewards: list[float]
) -> None:
    indices = best_and_worst(scored(make_group, "p", *rewards))
    if max(rewards) == min(rewards):
        assert indices is None
    else:
        assert indices is not None
        assert (rewards[indices[0]], rewards[indices[1]]) == (max(rewards), min(rewards))


def test_a_pair_carries_tokens_and_log_probabilities(make_group: MakeGroup) -> None:
    group = make_group(
        "p",
        completions=["a", "b", "c"],
        rewards=(0.0, 2.0, -1.0),
        prompt_token_ids=(1, 7),
        token_ids=((4,), (5, 5), (6, 6, 6)),
        logprobs=(-4.0, -5.0, -6.0),
    )
    pair = select_pairs([group]).pairs[0]
    assert (pair.prompt_id, pair.prompt_token_ids) == ("p", (1, 7))
    assert (pair.best, pair.ref_best) == ((5, 5), -5.0)
    assert (pair.worst, pair.ref_worst) == ((6, 6, 6), -6.0)


def test_ties_are_dropped_and_counted(make_group: MakeGroup) -> None:
    groups = [
        scored(make_group, "a", 1.0, 2.0),
        scored(make_group, "tie", 1.0, 1.0),
        scored(make_group, "b", 2.0, 1.0),
    ]
    selection = select_pairs(groups)
    assert [pair.prompt_id for pair in selection.pairs] == ["a", "b"]
    assert (selection.n, selection.tied) == (2, 1)


def test_only_ties_are_an_error(make_group: MakeGroup) -> None:
    groups = [scored(make_group, name, 1.0, 1.0) for name in "abc"]
    with pytest.raises(BonbonError, match=r"in all 3 groups .* tie"):
        select_pairs(groups)


def test_groups_of_two_sizes_are_an_error(make_group: MakeGroup) -> None:
    groups = [scored(make_group, "a", 1.0, 2.0), scored(make_group, "odd", 1.0, 2.0, 3.0)]
    with pytest.raises(BonbonError, match="group odd has 3 completions, others have 2"):
        select_pairs(groups)


def test_an_unscored_group_is_an_error(make_group: MakeGroup) -> None:
    with pytest.raises(BonbonError, match="group raw has no rewards; run `bonbon score`"):
        select_pairs([make_group("raw")])


def test_one_completion_is_an_error(make_group: MakeGroup) -> None:
    with pytest.raises(BonbonError, match=r"group lone has 1 completion; .* needs n >= 2"):
        select_pairs([scored(make_group, "lone", 1.0)])


def test_no_groups_are_an_error() -> None:
    with pytest.raises(BonbonError, match="no groups to train on"):
        select_pairs([])
