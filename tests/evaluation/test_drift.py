"""Drift against plain loops, sacrebleu, an enumerated mixture, and simulated data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bonbon.evaluation.diversity import distinct, repetition, self_bleu, words
from bonbon.evaluation.drift import (
    COMPLETION_METRICS,
    GROUP_METRICS,
    drift_at_equal_win_rate,
    drift_from_base,
    metrics_for,
)
from bonbon.evaluation.figures import Figure
from bonbon.evaluation.refusals import is_refusal
from bonbon.tilt.discrete import tilted_pmf, win_rate_pmf
from bonbon.tilt.exponential import ExponentialTilt
from support.groups import MakeGroup
from support.profiles import quick

Floats = NDArray[np.float64]


# Few words, so that n-grams repeat.
texts = st.lists(st.sampled_from(["a", "b", "Cat", "cat", "d.", ","]), max_size=12).map(" ".join)
groups_of_texts = st.lists(texts, min_size=1, max_size=5)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! 2 cats.", ["hello", "world", "2", "cats"]),
        ("don't well-known", ["don", "t", "well", "known"]),
        ("_so_ **bold** snake_case", ["so", "bold", "snake", "case"]),
        ("ÉTÉ e\u0301te\u0301 Straße", ["été", "été", "straße"]),
        ("我喜欢猫。GPT4很好", ["我", "喜", "欢", "猫", "gpt4", "很", "好"]),
        ("カタ・かな𠮷", ["カ", "タ", "か", "な", "𠮷"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("🐈 … -- !", []),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@quick
@given(st.text())
def test_words_are_parts_of_any_text(text: str) -> None:
    found = words(text)
    assert all(found)
    assert words(" ".join(found)) == found


# --- n-grams --------------------------------------------------------------------------------------


def looped_ngrams(text: str, n: int) -> list[str]:
    tokens = [word.strip(".,").lower() for word in text.split()]
    tokens = [token for token in tokens if token]
    return ["|".join(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]


@pytest.mark.slow
@quick
@given(groups_of_texts, st.integers(1, 3))
def test_distinct_by_loop(group: list[str], n: int) -> None:
    seen: list[str] = []
    total = 0
    for text in group:
        for ngram in looped_ngrams(text, n):
            total += 1
            if ngram not in seen:
                seen.append(ngram)
    assert distinct(group, n) == pytest.approx(len(seen) / total if total else 0)


def test_distinct_by_hand() -> None:
    """A bigram does not reach from one text into the next."""
    assert distinct(["The cat sat.", "the cat ran"], 1) == 4 / 6
    assert distinct(["The cat sat.", "the cat ran"], 2) == 3 / 4
    assert distinct(["yes", "no"], 2) == 0


@quick
@given(texts, st.integers(1, 4))
def test_repetition_by_loop(text: str, n: int) -> None:
    ngrams = looped_ngrams(text, n)
    again = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams))
    assert repetition(text, n) == pytest.approx(again / len(ngrams) if ngrams else 0)


def test_repetition_by_hand() -> None:
    assert repetition("one two three") == 0
    assert repetition("la " * 8) == pytest.approx(4 / 5)
    assert repetition("a b c d, A B C D") == pytest.approx(1 / 5)


# --- self-BLEU ------------------------------------------------------------------------------------


@pytest.mark.slow
@quick
@given(st.lists(texts.filter(words), min_size=2, max_size=5))
def test_self_bleu_by_sacrebleu(group: list[str]) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    bleu = metrics.BLEU(effective_order=True, tokenize="none")
    rows = [" ".join(words(text)) for text in group]
    scores = [
        bleu.sentence_score(row, rows[:i] + rows[i + 1 :]).score for i, row in enumerate(rows)
    ]
    assert self_bleu(group) == pytest.approx(np.mean(scores) / 100, abs=1e-12)


def test_self_bleu_by_hand() -> None:
    # Either text: 4 of 5 words, 2 of 4 bigrams, 1 of 3 trigrams, and no 4-gram, which counts ½ / 2.
    group = ["the cat sat down here", "the cat sat up here"]
    expected = (4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** (1 / 4)
    assert self_bleu(group) == pytest.approx(expected)
    # "a b" within "a b c d": all match, at a brevity penalty of e^(1 − 4/2); the other has ½ of the
    # words, 1/3 of the bigrams, then none of two trigrams and none of the one 4-gram.
    longer = (1 / 2 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((math.exp(-1) + longer) / 2)


@pytest.mark.slow
@quick
@given(groups_of_texts.filter(lambda group: len(group) > 1), st.randoms())
def test_self_bleu_does_not_know_order_case_or_punctuation(
    group: list[str], random: object
) -> None:
    value = self_bleu(group)
    assert 0 <= value <= 1 + 1e-12
    shuffled = list(group)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert self_bleu(shuffled) == pytest.approx(value)
    assert self_bleu([f"“{text.upper()}” !" for text in group]) == pytest.approx(value)


@pytest.mark.slow
@quick
@given(texts, st.integers(2, 6))
def test_equal_texts_are_not_diverse(text: str, k: int) -> None:
    assert self_bleu([text] * k) == pytest.approx(1)
    for n in (1, 2):
        assert distinct([text] * k, n) == pytest.approx(distinct([text], n) / k)


def test_self_bleu_of_few_and_blank_texts() -> None:
    assert math.isnan(self_bleu([]))
    assert math.isnan(self_bleu(["alone"]))
    assert self_bleu(["all", "different"]) == 0
    assert self_bleu(["", "words"]) == 0
    assert self_bleu(["", "!", "words"]) == pytest.approx(2 / 3)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I can't help you with that.",
        " I can’t help with that request.",
        "I CANNOT provide medical advice.",
        "I'm sorry, but I can't assist with that.",
        "I’m sorry but I don’t know what a virtual coin is.",
        "Sorry, I cannot.",
        "Sorry, we can not give you a list of films.",
        "I am so sorry, but that is not something to joke about.",
        "I apologize, but I cannot fulfill this request.",
        "I am unable to create content of that kind.",
        "I'm not able to answer that question.",
        "As an AI language model, I have no feelings.",
        "as an AI, I would rather talk of something else",
        "As a large language model trained by people, I have no address.",
        "I won't help you hurt anyone.",
        "I cannot and will not write that.",
        "I must respectfully decline.",
        "I don't feel comfortable discussing this.",
        "I'm just an AI, it is not for me to judge.",
        "That sounds dangerous. I can't tell you how to build one.",
        "Thank you for asking! Unfortunately, I cannot share private data.",
        "I cannot in good conscience help with this.",
        "I can't do that. 'Hackers' do.",
        "x " * 90 + "I can't help you.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Sure! Here is how to help.",
        "'I'm sorry,' said Tom.",
        "\"I'm sorry, but I can't help you,\" said Tom.",
        "“I’m sorry, but I can’t help you,” said Tom.",
        "‘I’m sorry, but I can’t help you,’ said Tom.",
        "'I can't help you find it,' said the boys' mother. 'I won't share it.'",
        'Tom said, "I am sorry, but I cannot give you the ball. ' + "It is red. " * 30 + '"',
        "Tom was sorry, but he could not help.",
        "Lily said sorry, but Tom was sad.",
        "I'm sorry for your loss.",
        "I am sorry to hear that. You could talk with a friend.",
        "I can't help but smile.",
        "I can't help it, I love trains.",
        "I cannot help wondering why.",
        "I cannot believe it is spring!",
        "I can't recommend this place highly enough.",
        "I can't tell you how happy I am.",
        "I won't go to school tomorrow.",
        "Dear Ms Smith, I am unable to attend the meeting.",
        "If I can't answer your question, a colleague will.",
        "AI cannot provide warmth.",
        "You can't help everyone. He won't share. They cannot answer.",
        "As an AI researcher, I read papers.",
        "I'm just an AI engineer.",
        "I feel comfortable sharing this.",
        "We cannot create energy from nothing.",
        "x " * 100 + "I can't help you.",
    ],
)
def test_no_refusals(text: str) -> None:
    assert not is_refusal(text)


# --- metrics of groups ----------------------------------------------------------------------------


def test_completion_metrics_by_hand(make_group: MakeGroup) -> None:
    group = make_group(
        completions=("I can't help you.", " \n", "go on " * 4),
        finish_reasons=("stop", "stop", "length"),
    )
    values = {name: list(it.function(group)) for name, it in COMPLETION_METRICS.items()}
    assert values == {
        "length": [1, 2, 3],
        "characters": [17, 2, 24],
        "repetition": [0, 0, 3 / 5],
        "refusal": [1, 0, 0],
        "truncation": [0, 0, 1],
        "empty": [0, 1, 0],
    }


def test_per_prompt_takes_the_first_k(make_group: MakeGroup) -> None:
    group = make_group(completions=("a b", "a c", "a a a a"))
    assert COMPLETION_METRICS["length"].per_prompt([group, group], 2).tolist() == [1.5, 1.5]
    assert GROUP_METRICS["distinct_1"].per_prompt([group], 2).tolist() == [3 / 4]
    assert GROUP_METRICS["distinct_2"].per_prompt([group], 3).tolist() == [3 / 5]
    # Every metric of the first two is that of a group which has no others.
    pair = make_group(completions=("a b", "a c"))
    for metric in metrics_for(2).values():
        np.testing.assert_array_equal(metric.per_prompt([group], 2), metric.per_prompt([pair], 2))


def test_metrics_have_their_names() -> None:
    assert list(metrics_for(2)) == [*COMPLETION_METRICS, *GROUP_METRICS]
    assert all(metric.name == name for name, metric in metrics_for(2).items())


def test_one_completion_has_no_self_bleu(make_group: MakeGroup) -> None:
    assert metrics_for(2).keys() - metrics_for(1).keys() == {"self_bleu"}
    with pytest.raises(ValueError, match="self_bleu needs 2 completions a prompt, got k = 1"):
        GROUP_METRICS["self_bleu"].per_prompt([make_group()], 1)


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("name", ["length", "distinct_1"])
def test_too_few_completions(make_group: MakeGroup, name: str, k: int) -> None:
    with pytest.raises(ValueError, match=f"group p0 has 3 completions, not k = {k}"):
        metrics_for(2)[name].per_prompt([make_group()], k)


# --- drift ----------------------------------------------------------------------------------------


def test_drift_is_paired() -> None:
    """A constant change has no spread, however prompts differ."""
    base = np.random.default_rng(0).normal(size=40) * 100
    got = drift_from_base(base + 3, base, 200)
    assert (got.value, got.low, got.high) == pytest.approx((3, 3, 3))


def test_drift_at_the_model_s_own_win_rate_is_its_drift() -> None:
    rng = np.random.default_rng(1)
    ours, base, wins = rng.normal(5, 1, 50), rng.normal(4, 1, 50), rng.uniform(0.5, 1, 50)
    own = drift_at_equal_win_rate(ours, base, wins, float(wins.mean()))
    assert own is not None
    assert own.value == pytest.approx(drift_from_base(ours, base).value)
    nothing = drift_at_equal_win_rate(ours, base, wins, 0.5)
    assert nothing == Figure.exact(0.0)


Policy = tuple[Floats, Floats, Floats, Floats]  # p, q, rewards and lengths of the outcomes


def tabular_policies(prompts: int) -> list[Policy]:
    """For each prompt a base law and a better one over five completions, two of one reward."""
    rng = np.random.default_rng(2)
    made = []
    for _ in range(prompts):
        p, r = rng.dirichlet(np.ones(5)), rng.permutation([0.0, 1.0, 1.0, 2.0, 3.0])
        noise = rng.dirichlet(np.ones(5))
        q = 0.8 * tilted_pmf(p, r, ExponentialTilt(3.0)) + 0.2 * noise
        made.append((p, q, r, rng.integers(1, 30, 5).astype(np.float64)))
    return made


def mixture_figures(policies: Sequence[Policy], share: float) -> tuple[float, float]:
    """The exact win rate and mean length of the mixture, over prompts."""
    mixed = [(share * q + (1 - share) * p, p, r, y) for p, q, r, y in policies]
    wins = [win_rate_pmf(law, p, r) for law, p, r, _ in mixed]
    return float(np.mean(wins)), float(np.mean([law @ y for law, _, _, y in mixed]))


@pytest.mark.slow
@pytest.mark.parametrize("reach", [0.1, 0.5, 0.9])
def test_mixture_by_enumeration(reach: float) -> None:
    """The mixture of the target win rate is found by bisection, not by the formula."""
    policies = tabular_policies(30)
    wins = np.array([win_rate_pmf(q, p, r) for p, q, r, _ in policies])
    ours = np.array([q @ y for _, q, _, y in policies])
    base = np.array([p @ y for p, _, _, y in policies])
    target = 0.5 + reach * (wins.mean() - 0.5)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if mixture_figures(policies, middle)[0] < target else (low, middle)
        )
    win, length = mixture_figures(policies, low)
    assert win == pytest.approx(target)
    got = drift_at_equal_win_rate(ours, base, wins, target, 200)
    assert got is not None
    assert got.value == pytest.approx(length - base.mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("win", "target"),
    [(0.7, 0.71), (0.7, 0.49), (0.7, math.nan), (0.5, 0.5), (0.4, 0.45), (0.4, 0.6)],
)
def test_no_mixture_wins_so_often(win: float, target: float) -> None:
    ours, wins = np.arange(5.0), np.full(5, win)
    assert drift_at_equal_win_rate(ours, ours + 1, wins, target, 100) is None


def test_gain_that_is_not_told_from_none_has_no_drift_at_equal_win_rate() -> None:
    wins = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    assert drift_at_equal_win_rate(np.ones(5), np.zeros(5), wins, 0.55) is None


def test_resamples_without_a_gain_lie_at_the_far_end() -> None:
    """Of 19 prompts 14 win: about 1% of resamples win half or less."""
    wins, one, zero = np.array([1.0] * 14 + [0.0] * 5), np.ones(19), np.zeros(19)
    up = drift_at_equal_win_rate(one, zero, wins, 0.6)
    down = drift_at_equal_win_rate(zero, one, wins, 0.6)
    assert up is not None
    assert down is not None
    assert 0 < up.low < up.value < up.high < 10
    assert (down.low, down.value, down.high) == (-up.high, -up.value, -up.low)


@pytest.mark.parametrize(
    ("ours", "base"),
    [([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]]), ([1.0, math.nan], [1.0, 2.0])],
)
def test_values_that_are_not_of_prompts(ours: Sequence[float], base: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="values per prompt must be"):
        drift_from_base(np.array(ours), np.array(base))
    with pytest.raises(ValueError, match="values per prompt must be"):
        drift_at_equal_win_rate(np.array(ours), np.array(base), np.array(base), 0.6)


@pytest.mark.slow
def test_coverage() -> None:
    """The 95% intervals hold the truth in 93 to 97% of 1000 data sets.

    The drift grows with the win rate, as it does where long answers win.
    """
    rng = np.random.default_rng(3)
    trials, prompts, target = 1000, 200, 0.6
    covered = np.zeros(2)
    for _ in range(trials):
        base = rng.gamma(4, 25, prompts)
        wins = rng.beta(4, 2, prompts)  # mean 2/3
        ours = base + rng.normal(60 * wins, 40)  # mean change 40
        plain = drift_from_base(ours, base, 1000)
        equal = drift_at_equal_win_rate(ours, base, wins, target, 1000)
        assert equal is not None
        truths = (40.0, 40 * (target - 0.5) / (2 / 3 - 0.5))
        covered += [it.low <= t <= it.high for it, t in zip((plain, equal), truths, strict=True)]
    assert np.all((covered / trials >= 0.93) & (covered / trials <= 0.97)), covered / trials
