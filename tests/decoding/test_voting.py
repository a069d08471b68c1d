"""Votes against exact enumeration, and extractors against GSM8K's answers."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding import RewardWeightedVote, SelfConsistency, ShortestMajorityVote
from bonbon.decoding.answers import boxed, final_line, gsm8k, last_number
from bonbon.decoding.strategy import Generation, WholeDraws
from bonbon.decoding.voting import counts, reward_weighted_scores, shortest_majority_scores, winner
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Candidates, Cost
from bonbon.system.errors import BonbonError
from support.groups import group_of
from support.profiles import quick

some_answers = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7)


def as_it_is(text: str) -> str | None:
    """An extractor: the text is the answer, `?` is none."""
    return None if text == "?" else text


def fails(text: str) -> str:
    raise KeyError(text)


def falsy(text: str) -> Any:
    """Answers that are no texts."""
    return {"zero": 0, "empty": "", "none": None, "pair": (1, 2)}[text]


HERE = "test_voting"


class Replay:
    """A source whose completions are listed, the same for every prompt."""

    def __init__(self, completions: Sequence[str], lengths: Sequence[int] | None = None) -> None:
        self.completions = completions
        self.lengths = lengths or [3] * len(completions)
        self.config = SamplingConfig(n=len(completions))
        self.draws = 0

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        self.draws += 1
        ids = tuple((7,) * length for length in self.lengths)
        return [
            Candidates(group_of(p.prompt_id, completions=self.completions, token_ids=ids), Cost())
            for p in prompts
        ]

    def embed(self, group: Group) -> Any:
        raise NotImplementedError


def choose(
    vote: WholeDraws,
    completions: Sequence[str],
    rewards: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
) -> int:
    """Which completion the vote returns, through `generate`."""
    reward = None if rewards is None else (lambda prompts, texts: np.array(rewards))
    prompt = EncodedPrompt("p0", "x", (1,))
    (found,) = vote.generate([prompt], Replay(completions, lengths), reward)
    assert isinstance(found, Generation)
    return found.chosen


# --- a task that can be checked -------------------------------------------------------------------

ANSWERS = {"right": 0.45, "wrong": 0.35, "other": 0.15, "?": 0.05}


def probability(chosen: Callable[[tuple[str, ...]], int], n: int) -> float:
    """P(the returned completion is right), over every sequence of n draws."""
    return sum(
        math.prod(ANSWERS[y] for y in draws)
        for draws in itertools.product(ANSWERS, repeat=n)
        if draws[chosen(draws)] == "right"
    )


def test_self_consistency_is_right_as_often_as_the_law_says() -> None:
    """n = 3: two right ones, or a right one drawn first among answers that all differ.

    A missing answer does not vote: with one missing, `right` needs both others or the first vote.
    """
    vote = SelfConsistency(extractor=f"{HERE}:as_it_is")
    found = probability(lambda draws: choose(vote, draws), 3)
    p, q, s, none = ANSWERS.values()
    majority = p**3 + 3 * p**2 * (1 - p)
    alone = p * 2 * q * s  # first of three different answers
    before_one = 3 * none * p * (q + s)  # with one missing, first of two different answers
    only = 3 * none**2 * p
    assert found == pytest.approx(majority + alone + before_one + only)
    assert found > p


def test_shortest_majority_vote_prefers_the_short_of_two() -> None:
    """Two answers, one vote each: the shorter wins, whichever came first."""
    vote = ShortestMajorityVote(extractor=f"{HERE}:as_it_is")
    assert choose(vote, ["a", "b"], lengths=[50, 10]) == 1
    assert choose(vote, ["a", "b"], lengths=[10, 50]) == 0
    assert choose(vote, ["a", "b"], lengths=[10, 10]) == 0
    # 2/ln 100 = 0.43 against 1/ln 5 = 0.62: far fewer tokens outweigh a vote.
    assert choose(vote, ["a", "a", "b"], lengths=[90, 110, 5]) == 2
    assert choose(vote, ["a", "a", "b"], lengths=[90, 110, 50]) == 0


# --- scores ---------------------------------------------------------------------------------------


def test_shortest_majority_scores() -> None:
    scores = shortest_majority_scores(["a", "b", "a", None, "c"], [10, 1, 30, 500, 0])
    assert scores == {
        "a": pytest.approx(2 / math.log(20)),
        "b": pytest.approx(1 / math.log(2)),  # a single token counts as two
        "c": pytest.approx(1 / math.log(2)),
    }


@quick
@given(some_answers, st.data())
def test_reward_weighted_scores(answers: list[str | None], data: st.DataObject) -> None:
    """Against Σ e^(r/τ) with no precaution, normalised; the same for shifted rewards."""
    rewards = data.draw(st.lists(st.floats(-5, 5), min_size=len(answers), max_size=len(answers)))
    tau = data.draw(st.floats(0.1, 10))
    scores = reward_weighted_scores(answers, rewards, tau)
    voting = [(a, math.exp(r / tau)) for a, r in zip(answers, rewards, strict=True) if a]
    total = sum(weight for _, weight in voting)
    for answer in set(answers) - {None}:
        expected = sum(weight for a, weight in voting if a == answer) / total
        assert scores[str(answer)] == pytest.approx(expected)
    shifted = reward_weighted_scores(answers, [r - 1000 for r in rewards], tau)
    assert shifted == pytest.approx(scores)


@pytest.mark.slow
@quick
@given(some_answers, st.data())
def test_the_limits_of_the_reward_weighted_vote(
    answers: list[str | None], data: st.DataObject
) -> None:
    """τ → 0 is the best that votes, τ → ∞ self-consistency with the same rewards."""
    rewards = data.draw(st.permutations([0.5 * i - 1 for i in range(len(answers))]))
    texts = [answer or "?" for answer in answers]
    extractor = f"{HERE}:as_it_is"
    cold = choose(RewardWeightedVote(extractor=extractor, tau=1e-300), texts, rewards)
    voting = [i for i, answer in enumerate(answers) if answer] or range(len(answers))
    assert cold == max(voting, key=lambda i: rewards[i])
    hot = choose(RewardWeightedVote(extractor=extractor, tau=1e300), texts, rewards)
    assert hot == choose(SelfConsistency(extractor=extractor), texts, rewards)


@quick
@given(some_answers)
def test_counts_and_the_winner(answers: list[str | None]) -> None:
    """The most frequent answer, of tied ones the first drawn, and its first completion."""
    found = answers[winner(counts(answers), answers, None)]
    voted = [answer for answer in answers if answer]
    if not voted:
        assert winner(counts(answers), answers, None) == 0
        return
    most = max(voted.count(answer) for answer in voted)
    assert found == next(answer for answer in voted if voted.count(answer) == most)
    assert answers.index(found) == winner(counts(answers), answers, None)


# --- which completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SelfConsistency, ShortestMajorityVote, RewardWeightedVote])
def test_the_winning_answer_s_best_completion(kind: type[WholeDraws]) -> None:
    vote = kind(extractor=f"{HERE}:as_it_is")
    assert choose(vote, ["b", "a", "a", "a"], [1.2, 0.1, 0.9, 0.9]) == 2
    assert choose(vote, ["?", "?", "?"], [0.0, 2.0, 2.0]) == 1  # no votes: the best


@pytest.mark.parametrize("kind", [SelfConsistency, ShortestMajorityVote])
def test_without_rewards_the_first_drawn(kind: type[WholeDraws]) -> None:
    vote = kind(extractor=f"{HERE}:as_it_is")
    assert choose(vote, ["b", "a", "a"]) == 1
    assert choose(vote, ["?", "?"]) == 0
    assert choose(vote, ["?", "b"]) == 1


def test_answers_are_compared_by_their_text() -> None:
    """0 is an answer, an empty text is none, and anything with a text votes."""
    vote = SelfConsistency(extractor=f"{HERE}:falsy")
    assert choose(vote, ["empty", "none", "empty", "zero"]) == 3
    assert choose(vote, ["zero", "pair", "pair"]) == 1


# --- extractors of one's own ----------------------------------------------------------------------


def test_an_extractor_that_raises_is_named() -> None:
    vote = SelfConsistency(extractor=f"{HERE}:fails")
    with pytest.raises(
        BonbonError, match=rf"'{HERE}:fails' failed at prompt p0, completion 1.*Key"
    ):
        choose(vote, ["a", "b"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere", "package.module:function"), (f"{HERE}:nothing", "cannot be imported")],
)
def test_an_extractor_that_is_not_there_costs_no_draws(name: str, said: str) -> None:
    source = Replay(["a", "b"])
    with pytest.raises(BonbonError, match=said):
        SelfConsistency(extractor=name).generate([EncodedPrompt("p", "x", (1,))], source, None)
    assert source.draws == 0


# --- the extractors that there are ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 1,234.50", "1234.5"),
        ("$5", "5"),
        ("-3", "-3"),
        ("−$7.00.", "-7"),
        ("$-5", "-5"),
        ("x=-3", "-3"),
        ("between 3-5", "5"),
        ("10-3=7", "7"),
        ("The answer is 42.", "42"),
        ("5.0", "5"),
        ("about 12.50%", "12.5"),
        ("1, 2, 3", "3"),
        ("(1,2)", "2"),
        ("12,34", "34"),
        ("a half is .5", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("100", "100"),
        ("1.5e-3", "0.0015"),
        ("+4", "4"),
        ("none at all", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@quick
@given(st.integers(-(10**40), 10**40), st.integers(0, 6), st.integers(0, 3))
def test_a_number_has_one_spelling(whole: int, places: int, zeros: int) -> None:
    """However it is written: with commas, zeros behind the point, a currency, a full stop."""
    digits = str(abs(whole)).rjust(places + 1, "0")
    point = len(digits) - places
    body, behind = digits[:point], digits[point:].rstrip("0")
    plain = body + ("." + behind if behind else "")
    sign = "-" if whole < 0 else ""
    grouped = f"{int(body):,}" + ("." + behind + "0" * zeros if behind or zeros else "")
    for written in (sign + plain, f"{sign}${grouped}", f"it is {sign}{grouped}."):
        assert last_number(written) == sign + plain
        assert boxed(rf"\boxed{{{written.removeprefix('it is ')}}}") == sign + plain


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ x + {y} } and more", "x + {y}"),
        (r"\boxed{1} then \boxed{2", "1"),  # cut off
        (r"\boxed {\text{a\}b}}", r"\text{a\}b}"),
        (r"\boxed{\$1,000.0}", "1000"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{}", None),
        ("no box", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_final_line() -> None:
    assert final_line("first\n the answer \n\n  ") == "the answer"
    assert final_line("so\n 5.00 ") == "5"
    assert final_line(" \n") is None


def test_gsm8k() -> None:
    assert gsm8k("#### 1\n#### 2,000\nthat is 3") == "2000"
    assert gsm8k("#### nothing\n4") is None
    assert gsm8k("it is 4") is None


@pytest.mark.slow
def test_gsm8k_s_own_answers(shared: Path) -> None:
    """All 1,319, by each extractor that can read them, and in shuffled votes."""
    rows = [json.loads(line) for line in (shared / "data/gsm8k/test.jsonl").open(encoding="utf-8")]
    assert len(rows) == 1319
    for row in rows:
        reasoning, _, written = row["answer"].rpartition("\n#### ")
        gold = int(written.replace(",", ""))
        assert gsm8k(row["answer"]) == str(gold)
        assert last_number(row["answer"]) == str(gold)
        assert boxed(rf"{reasoning} so \boxed{{{written}}}") == str(gold)
        assert final_line(f"{reasoning}\n{written}.0") == str(gold)
    order = random.Random(0)
    for row in rows[:50]:
        gold = gsm8k(row["answer"])
        texts = [row["answer"], f"So it is {gold}.0.", "It is 123456", "I do not know"]
        order.shuffle(texts)
        assert last_number(texts[choose(SelfConsistency(), texts)]) == gold
