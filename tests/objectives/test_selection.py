"""Which completions of a group an objective gets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bonbon.groups.group import Group
from bonbon.objectives.selection import (
    Selector,
    all_completions,
    best,
    best_and_random,
    best_and_worst,
    random_pair,
)
from bonbon.system.errors import BonbonError
from bonbon.training.dataset import select_groups
from bonbon.training.dataset_file import SelectedGroups
from support.groups import MakeGroup
from support.profiles import quick

SELECTORS: list[Selector] = [best, best_and_worst, best_and_random, random_pair, all_completions]
every_selector = pytest.mark.parametrize("select", SELECTORS, ids=lambda select: select.__name__)

# No deadline: a busy machine must not turn a test red.

# Few values, so that ties are common, or any.
some_rewards = st.lists(
    st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e6, 1e6)), min_size=2, max_size=9
)
names = st.text(max_size=5)


def scored(make_group: MakeGroup, name: str, *rewards: float) -> Group:
    return make_group(name, completions=["x"] * len(rewards), rewards=rewards)


# --- selectors ------------------------------------------------------------------------------------


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
    group = scored(make_group, "p", *rewards)
    assert best_and_worst(group) == indices
    assert best(group) == (None if indices is None else indices[:1])


@quick
@given(rewards=some_rewards)
def test_best_is_the_maximum_and_worst_the_minimum(
    make_group: MakeGroup, rewards: list[float]
) -> None:
    indices = best_and_worst(scored(make_group, "p", *rewards))
    if max(rewards) == min(rewards):
        assert indices is None
    else:
        assert indices is not None
        assert (rewards[indices[0]], rewards[indices[1]]) == (max(rewards), min(rewards))


@every_selector
@quick
@given(rewards=some_rewards, name=names)
def test_the_better_come_first_and_ties_are_no_choice(
    make_group: MakeGroup, select: Selector, rewards: list[float], name: str
) -> None:
    indices = select(scored(make_group, name, *rewards))
    if max(rewards) == min(rewards):
        assert indices is None
        return
    assert indices is not None
    assert len(set(indices)) == len(indices)
    chosen = [rewards[index] for index in indices]
    if select is all_completions:
        assert indices == tuple(range(len(rewards)))
    else:
        assert len(indices) == (1 if select is best else 2)
        assert chosen == sorted(set(chosen), reverse=True)  # strictly ordered
        assert select is random_pair or chosen[0] == max(rewards)


@quick
@given(rewards=some_rewards, name=names)
def test_of_two_completions_every_pair_is_the_best_and_the_worst(
    make_group: MakeGroup, rewards: list[float], name: str
) -> None:
    group = scored(make_group, name, *rewards[:2])
    assert best_and_random(group) == random_pair(group) == best_and_worst(group)


@pytest.mark.parametrize(
    ("select", "rewards", "possible"),
    [
        (best_and_random, (1.0, 3.0, 2.0, 3.0, 0.0), {(1, 0), (1, 2), (1, 4)}),
        (random_pair, (1.0, 3.0, 1.0), {(1, 0), (1, 2)}),
        (random_pair, (1.0, 2.0, 3.0), {(1, 0), (2, 0), (2, 1)}),
    ],
)
def test_random_choices_are_uniform_over_prompts(
    make_group: MakeGroup,
    select: Selector,
    rewards: tuple[float, ...],
    possible: set[tuple[int, int]],
) -> None:
    found = Counter(select(scored(make_group, f"p{i}", *rewards)) for i in range(1500))
    assert set(found) == possible
    assert stats.chisquare(list(found.values())).pvalue > 1e-4


@pytest.mark.parametrize("select", [best_and_random, random_pair])
def test_random_choices_depend_on_the_prompt_s_id_alone(
    make_group: MakeGroup, select: Selector, tmp_path: Path
) -> None:
    """Not on the texts, the call, or the group's place in the data set."""
    rewards = (0.3, 0.1, 0.9, 0.5)
    groups = [scored(make_group, f"p{i}", *rewards) for i in range(40)]
    others = [
        make_group(f"p{i}", "another prompt", ["y"] * 4, rewards=rewards, logprobs=(-9.0,) * 4)
        for i in range(40)
    ]
    chosen = [select(group) for group in groups]
    assert chosen == [select(group) for group in groups] == [select(group) for group in others]
    assert len(set(chosen)) > 2
    selection = list(taken(groups, select, tmp_path))
    assert selection == list(taken(groups[::-1], select, tmp_path))[::-1]


def test_another_process_makes_the_same_random_choices(make_group: MakeGroup) -> None:
    """Python salts the hashes of texts anew in every process; the choices must not follow."""
    script = (
        "from conftest import group_of\n"
        "from bonbon.objectives.selection import random_pair\n"
        "rewards = (0.3, 0.1, 0.9, 0.5)\n"
        "groups = [group_of(f'p{i}', completions='abcd', rewards=rewards) for i in range(20)]\n"
        "print([random_pair(group) for group in groups])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    here = [random_pair(scored(make_group, f"p{i}", 0.3, 0.1, 0.9, 0.5)) for i in range(20)]
    assert ran.stdout.strip() == str(here)


# --- a data set -----------------------------------------------------------------------------------


def taken(groups: Sequence[Group], select: Selector, folder: Path) -> SelectedGroups:
    selected = select_groups(groups, select, folder)
    assert selected is not None
    return selected


@pytest.mark.parametrize(
    ("select", "indices"),
    [(best, (1,)), (best_and_worst, (1, 2)), (all_completions, (0, 1, 2))],
)
def test_the_chosen_carry_tokens_log_probabilities_and_rewards(
    make_group: MakeGroup, select: Selector, indices: Sequence[int], tmp_path: Path
) -> None:
    group = make_group(
        "p",
        completions=["a", "b", "c"],
        rewards=(0.0, 2.0, -1.0),
        prompt_token_ids=(1, 7),
        token_ids=((4,), (5, 5), (6, 6, 6)),
        logprobs=(-4.0, -5.0, -6.0),
    )
    (chosen,) = taken([group], select, tmp_path)
    assert (chosen.prompt_id, chosen.prompt_token_ids) == ("p", (1, 7))
    assert chosen.completions == tuple(((4,), (5, 5), (6, 6, 6))[i] for i in indices)
    assert chosen.ref_logps == tuple((-4.0, -5.0, -6.0)[i] for i in indices)
    assert chosen.rewards == tuple((0.0, 2.0, -1.0)[i] for i in indices)


@every_selector
def test_ties_are_dropped_and_counted(
    make_group: MakeGroup, select: Selector, tmp_path: Path
) -> None:
    groups = [
        scored(make_group, "a", 1.0, 2.0),
        scored(make_group, "tie", 1.0, 1.0),
        scored(make_group, "b", 2.0, 1.0),
    ]
    for _ in range(2):
        chosen = taken(groups, select, tmp_path)
        assert [group.prompt_id for group in chosen] == ["a", "b"]
        assert (chosen.n, chosen.tied) == (2, 1)


def test_n_counts_what_was_drawn_not_what_was_chosen(make_group: MakeGroup, tmp_path: Path) -> None:
    groups = [scored(make_group, "a", 1.0, 2.0, 3.0)]
    for select in SELECTORS:
        assert taken(groups, select, tmp_path).n == 3


@every_selector
def test_only_ties_are_an_error(make_group: MakeGroup, select: Selector, tmp_path: Path) -> None:
    groups = [scored(make_group, name, 1.0, 1.0) for name in "abc"]
    with pytest.raises(BonbonError, match=r"in all 3 groups .* tie"):
        taken(groups, select, tmp_path)


@every_selector
def test_groups_of_two_sizes_are_an_error(
    make_group: MakeGroup, select: Selector, tmp_path: Path
) -> None:
    groups = [scored(make_group, "a", 1.0, 2.0), scored(make_group, "odd", 1.0, 2.0, 3.0)]
    with pytest.raises(BonbonError, match="group odd has 3 completions, others have 2"):
        taken(groups, select, tmp_path)


@every_selector
def test_an_unscored_group_is_an_error(
    make_group: MakeGroup, select: Selector, tmp_path: Path
) -> None:
    with pytest.raises(BonbonError, match="group raw has no rewards; run `bonbon score`"):
        taken([make_group("raw")], select, tmp_path)


@every_selector
def test_one_completion_is_an_error(
    make_group: MakeGroup, select: Selector, tmp_path: Path
) -> None:
    with pytest.raises(BonbonError, match=r"group lone has 1 completion; .* needs n >= 2"):
        taken([scored(make_group, "lone", 1.0)], select, tmp_path)


@every_selector
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error(
    make_group: MakeGroup, select: Selector, reward: float, tmp_path: Path
) -> None:
    with pytest.raises(BonbonError, match=r"prompt odd, completion 2 of 3, is -?(nan|inf); .*fin"):
        taken([scored(make_group, "odd", 1.0, reward, 2.0)], select, tmp_path)


@every_selector
def test_no_groups_are_an_error(select: Selector, tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match="no groups to train on"):
        taken([], select, tmp_path)
