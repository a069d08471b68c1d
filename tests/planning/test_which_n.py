"""Plans for n: against exact win rates of finite outcome spaces, and n/(n+1)."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bonbon.groups.group import Group, Groups
from bonbon.planning.which_n import Plan, plan, plan_sentences, plan_table, sampling_speed
from bonbon.report.paper_plots import plot_plan
from bonbon.system.errors import BonbonError
from bonbon.tilt.discrete import best_of_n_pmf, win_rate_pmf
from support.groups import group_of
from support.profiles import brief as quick


def scored(index: int, rewards: Sequence[float], tokens: int = 10, **changes: Any) -> Group:
    n = len(rewards)
    values: dict[str, Any] = {
        "completions": ["x"] * n,
        "token_ids": ((7,) * tokens,) * n,
        "rewards": tuple(map(float, rewards)),
    }
    return group_of(f"p{index}", **(values | changes))


def pilot(rewards: Any, provenance: dict[str, Any] | None = None, **changes: Any) -> Groups:
    return Groups([scored(i, row, **changes) for i, row in enumerate(rewards)], provenance)


def normal_pilot(prompts: int = 12, draws: int = 6) -> Groups:
    return pilot(np.random.default_rng(0).normal(size=(prompts, draws)))


# --- which n --------------------------------------------------------------------------------------


@pytest.mark.slow
@quick
@given(st.integers(5, 9), st.integers(2, 40), st.floats(0.51, 0.97))
def test_without_ties_n_is_that_of_the_closed_form(draws: int, prompts: int, wanted: float) -> None:
    """n/(n+1) ≥ w from n = w/(1 − w) on: exactly, measured or extrapolated."""
    found = plan(normal_pilot(prompts, draws), wanted, max_n=60)
    n = math.ceil(wanted / (1 - wanted) - 1e-6)
    for row in (found.by_estimate, found.surely):
        assert row is not None
        assert row.n == n
        assert row.win_rate.value == pytest.approx(n / (n + 1))
        assert row.extrapolated == (n >= draws)
    assert not found.ties


@pytest.mark.slow
def test_a_win_rate_of_nine_in_ten_takes_nine() -> None:
    found = plan(normal_pilot(), 0.9)
    assert found.by_estimate is not None
    assert (found.by_estimate.n, found.by_estimate.tokens) == (9, 90)
    assert found.by_estimate.kl == pytest.approx(math.log(9) - 8 / 9)
    assert [row.n for row in found.rows] == [1, 2, 4, 5, 8, 9, *(2**i for i in range(4, 11))]
    assert [row.n for row in found.rows if not row.extrapolated] == [1, 2, 4, 5]
    assert found.largest_n == found.best.n == 1024


P = np.array([0.1, 0.2, 0.15, 0.25, 0.1, 0.2])
R = np.array([0.0, 1.0, 1.0, 2.0, 3.0, 3.0])  # ties within a level and between draws
GOLD = np.array([0.0, 5.0, 1.0, 2.0, 4.0, 1.0])  # dislikes some of what R likes


def drawn(rng: np.random.Generator, prompts: int, draws: int) -> Groups:
    chosen = rng.choice(len(P), size=(prompts, draws), p=P)
    return Groups(
        [
            scored(i, R[row], metrics={"gold": tuple(map(float, GOLD[row]))})
            for i, row in enumerate(chosen)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("by", [None, "gold"])
def test_intervals_hold_the_exact_win_rate(by: str | None) -> None:
    """Measured n, over 200 pilots of a finite outcome space: about 95 of 100."""
    rng = np.random.default_rng(1)
    judge = R if by is None else GOLD
    truth = {n: win_rate_pmf(best_of_n_pmf(P, R, n), P, judge) for n in (1, 2, 4)}
    held: dict[int, list[bool]] = {n: [] for n in truth}
    values: dict[int, list[float]] = {n: [] for n in truth}
    for _ in range(200):
        for row in plan(drawn(rng, 100, 5), 0.7, by, max_n=4).rows:
            if row.n in truth:  # not 3, which is shown when it is an answer
                low, high = row.win_rate.low - 1e-9, row.win_rate.high + 1e-9
                held[row.n].append(low <= truth[row.n] <= high)
                values[row.n].append(row.win_rate.value)
    for n, exact in truth.items():
        assert np.mean(held[n]) > 0.9
        error = np.std(values[n]) / len(values[n]) ** 0.5
        assert abs(np.mean(values[n]) - exact) <= 4 * error + 1e-9
    assert truth[4] > 0.7 if by is None else truth[4] < 0.7


@pytest.mark.slow
def test_the_answers_of_a_large_pilot_are_those_of_the_exact_curve() -> None:
    truth = [win_rate_pmf(best_of_n_pmf(P, R, n), P, R) for n in range(1, 8)]
    wanted = (truth[3] + truth[4]) / 2
    found = plan(drawn(np.random.default_rng(2), 3000, 8), wanted, max_n=7)
    assert found.ties
    assert found.by_estimate is not None
    assert found.by_estimate.n == 5
    assert found.surely == found.by_estimate
    # Between the estimate and its lower end the answers part.
    small = plan(drawn(np.random.default_rng(4), 60, 8), wanted - 0.01, max_n=7)
    assert small.by_estimate is not None
    assert small.surely is not None
    assert small.surely.n > small.by_estimate.n
    assert small.surely.win_rate.low >= small.wanted > small.by_estimate.win_rate.low


def test_what_no_n_reaches() -> None:
    """The win rate of binary rewards tends to 1 − p/2 = 0.75; from 4 draws nothing is guessed."""
    rewards = np.random.default_rng(0).integers(0, 2, (50, 4))
    found = plan(pilot(rewards), 0.9)
    assert found.by_estimate is None
    assert found.surely is None
    assert found.largest_n == found.best.n == 3
    assert [row.n for row in found.rows] == [1, 2, 3]
    said = " ".join(plan_sentences(found))
    assert "No n up to 3 reaches a win rate of 0.9; the best is n = 3: 0.6" in said
    assert "nothing is extrapolated from fewer than 5" in said


def test_all_rewards_tied() -> None:
    found = plan(pilot(np.ones((3, 6))), 0.6, max_n=16)
    assert found.by_estimate is None
    for row in found.rows:
        assert [row.win_rate.low, row.win_rate.high] == pytest.approx([0.5, 0.5])
    assert found.best.n == 1


def test_a_further_reward_that_best_of_n_does_not_raise() -> None:
    """A judge that wants the opposite: every win rate is below a half."""
    rewards = np.random.default_rng(0).normal(size=(20, 6))
    groups = Groups(
        [scored(i, row, metrics={"gold": tuple(-row)}) for i, row in enumerate(rewards)]
    )
    found = plan(groups, 0.6, "gold", max_n=30)
    assert found.by_estimate is None
    assert found.best.n == 1
    for row in found.rows:
        assert row.win_rate.value == pytest.approx(1 / (row.n + 1))
    assert "by gold" in plan_sentences(found)[0]


# --- pilots ---------------------------------------------------------------------------------------


def test_the_first_draws_of_prompts_with_more() -> None:
    rewards = np.random.default_rng(0).integers(0, 5, (10, 9))
    uneven = Groups([scored(i, row[: 6 + i % 3], tokens=6) for i, row in enumerate(rewards)])
    assert plan(uneven, 0.8, max_n=9) == plan(pilot(rewards[:, :6], tokens=6), 0.8, max_n=9)
    assert plan(uneven, 0.8, max_n=9).draws == 6


def test_cost_in_tokens_and_seconds() -> None:
    known = {"tokens": 600, "seconds": 3.0}
    groups = Groups([scored(0, [1, 2, 3], tokens=10), scored(1, [1, 2, 3], tokens=30)], known)
    found = plan(groups, 0.6, max_n=2)
    assert [row.tokens for row in found.rows] == [20, 40]
    assert [row.seconds for row in found.rows] == [pytest.approx(0.1), pytest.approx(0.2)]
    faster = plan(groups, 0.6, max_n=2, tokens_per_second=1000)
    assert faster.rows[1].seconds == pytest.approx(0.04)
    assert plan(normal_pilot(), 0.6, max_n=2).rows[0].seconds is None
    assert sampling_speed(known | {"reward": {"model": "m"}}) is None  # the scoring's seconds
    assert sampling_speed({"tokens": 5}) is None
    assert sampling_speed({"tokens": 5, "seconds": 0}) is None


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([scored(0, [1, 2, 3])], "two prompts or more"),
        ([], "two prompts or more"),
        ([scored(0, [1, 2, 3]), scored(1, [1, 2])], "prompt p1 has 2; sample the pilot with"),
        ([scored(0, [1, 2, 3]), scored(1, [1, 2, math.nan])], "p1, completion 3 of 3, is nan"),
        ([scored(0, [math.inf, 2, 3]), scored(1, [1, 2, 3])], "p0, completion 1 of 3, is inf"),
        ([scored(0, [1, 2, 3]), group_of("p1")], "p1 is not scored"),
        (
            [scored(0, [1] * 3), scored(1, [1] * 3, finish_reasons=("stop", "rejected", "stop"))],
            "p1 has rejected completions",
        ),
    ],
)
def test_pilots_that_do_not_serve(groups: list[Group], said: str) -> None:
    with pytest.raises(BonbonError, match=said):
        plan(Groups(groups), 0.8)


def test_wishes_that_cannot_be() -> None:
    for wanted in (0.0, 1.0, 90.0, math.nan):
        with pytest.raises(BonbonError, match="win rate lies between 0 and 1"):
            plan(normal_pilot(), wanted)
    with pytest.raises(BonbonError, match="1 to 10,000, not 0"):
        plan(normal_pilot(), 0.8, max_n=0)
    with pytest.raises(BonbonError, match=r"no metric 'gold' \(metrics: it has none\)"):
        plan(normal_pilot(), 0.8, "gold")
    bad = pilot([[1, 2, 3]] * 2, metrics={"gold": (1.0, math.nan, 2.0)})
    with pytest.raises(BonbonError, match="the gold of prompt p0, completion 2 of 3, is nan"):
        plan(bad, 0.8, "gold")


# --- said, drawn and written ----------------------------------------------------------------------


def shown(found: Plan) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(plan_table(found))
    return captured.get()


def test_sentences_and_table() -> None:
    found = plan(normal_pilot(), 0.9, max_n=16, tokens_per_second=100)
    said = plan_sentences(found)
    assert said[0] == (
        "By the estimate, a win rate of 0.9 takes n = 9 (extrapolated): 0.900 (95% interval 0.900 "
        "to 0.900) with a KL of 1.31 nats, for 90 tokens and 0.9 s a prompt."
    )
    assert said[1:] == [
        "6 draws a prompt measure n up to 5; beyond, n/(n+1) holds as long as no rewards tie."
    ]
    text = shown(found)
    assert "9*" in text
    assert "5*" not in text
    assert "upper bound" not in text


def test_ties_and_guesses_are_said() -> None:
    found = plan(drawn(np.random.default_rng(4), 60, 8), 0.8, max_n=40)
    said = " ".join(plan_sentences(found))
    for part in (
        "with a KL of at most",
        "is a guess where rewards tie",
        "lies below ln n − (n−1)/n",
        "For the interval's lower end it takes n = ",
    ):
        assert part in said
    assert "an upper bound (rewards tie)" in shown(found)
    judged = plan(drawn(np.random.default_rng(4), 10, 8), 0.9, "gold", max_n=40)
    assert "is a guess where another reward decides" in " ".join(plan_sentences(judged))


def test_an_interval_that_stays_too_low_is_said() -> None:
    groups = drawn(np.random.default_rng(4), 10, 8)
    wanted = plan(groups, 0.9, max_n=7).best.win_rate.value - 1e-6
    said = " ".join(plan_sentences(plan(groups, wanted, max_n=7)))
    assert "The interval's lower end reaches it for no n up to 7; more prompts" in said


@pytest.mark.slow
def test_the_plot(tmp_path: Path) -> None:
    """As SVG: the measured part solid, the extrapolated one dashed, every n in its place."""
    found = plan(drawn(np.random.default_rng(4), 30, 6), 0.8, "gold", max_n=20)
    plot_plan(found, tmp_path / "plan.svg")
    plot_plan(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    styles = [
        element.get("style", "")
        for element in root.iter("{http://www.w3.org/2000/svg}path")
        if "stroke: #0b4f9e" in element.get("style", "")
    ]
    assert any("stroke-dasharray" in style for style in styles)
    assert any("stroke-dasharray" not in style for style in styles)
    text = (tmp_path / "plan.svg").read_text()
    for label in ["win rate of best-of-n by gold", "extrapolated", "wanted", "95% interval"]:
        assert f"<!-- {label} -->" in text
    for row in found.rows:
        assert f"<!-- {row.n} -->" in text
    # Nothing extrapolated: nothing dashed.
    plot_plan(plan(drawn(np.random.default_rng(4), 30, 6), 0.8, max_n=5), tmp_path / "measured.svg")
    assert "<!-- extrapolated -->" not in (tmp_path / "measured.svg").read_text()
    with pytest.raises(BonbonError, match="must end in one of png"):
        plot_plan(found, tmp_path / "plan.gif")


def test_no_torch_is_loaded() -> None:
    code = "import bonbon.planning.which_n, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
