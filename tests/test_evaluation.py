"""Measurements against double loops, enumerated subsets, and a policy enumerated in full.

These numbers are the toolkit's claims, so the estimators are checked for being unbiased, not merely
for being close.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from bonbon.evaluation import (
    Evaluator,
    Figure,
    best_of_n_win_rate,
    bootstrap,
    completion_kls,
    win_rate,
)
from bonbon.groups import Group
from bonbon.tilt import BestOfN, best_of_n_pmf, optimal_kl, win_rate_pmf

Floats = NDArray[np.float64]

quick = settings(deadline=None, max_examples=60, derandomize=True)

# Few values, so that ties are common.
few = st.integers(-1, 2).map(float)


def beats(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


# --- win rates ------------------------------------------------------------------------------------


@quick
@given(st.lists(few, min_size=1, max_size=7), st.lists(few, min_size=1, max_size=7))
def test_win_rate_by_double_loop(ours: list[float], base: list[float]) -> None:
    expected = sum(beats(a, b) for a in ours for b in base) / (len(ours) * len(base))
    assert win_rate(ours, base) == pytest.approx(expected)
    assert win_rate(ours, base) + win_rate(base, ours) == pytest.approx(1)


def enumerated_best_of_n(chooser: Sequence[float], judge: Sequence[float], n: int) -> float:
    """Every opponent against the best of every n-subset of the others, ties shared evenly."""
    wins = []
    for opponent in range(len(chooser)):
        others = [k for k in range(len(chooser)) if k != opponent]
        for subset in itertools.combinations(others, n):
            top = max(chooser[k] for k in subset)
            tied = [k for k in subset if chooser[k] == top]
            wins.append(sum(beats(judge[k], judge[opponent]) for k in tied) / len(tied))
    return sum(wins) / len(wins)


@quick
@given(st.lists(st.tuples(few, few), min_size=2, max_size=7), st.data())
def test_best_of_n_win_rate_by_enumeration(
    rewards: list[tuple[float, float]], data: st.DataObject
) -> None:
    """With one reward for both, and with a judge that does not know what the chooser likes."""
    n = data.draw(st.integers(1, len(rewards) - 1), label="n")
    chooser, judge = (list(column) for column in zip(*rewards, strict=True))
    for decider in (chooser, judge):
        expected = enumerated_best_of_n(chooser, decider, n)
        assert best_of_n_win_rate(chooser, decider, n) == pytest.approx(expected)


@quick
@given(st.data())
def test_best_of_n_win_rate_is_unbiased(data: st.DataObject) -> None:
    """Its expectation over all draws of m from a small law is the exact win rate of that law."""
    weights = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3), label="p")
    p = np.array(weights) / sum(weights)
    r = np.array(data.draw(st.lists(few, min_size=len(p), max_size=len(p)), label="r"))
    m = data.draw(st.integers(2, 4), label="m")
    n = data.draw(st.integers(1, m - 1), label="n")
    mean = sum(
        math.prod(p[y] for y in draws) * best_of_n_win_rate(r[list(draws)], r[list(draws)], n)
        for draws in itertools.product(range(len(p)), repeat=m)
    )
    assert mean == pytest.approx(win_rate_pmf(best_of_n_pmf(p, r, n), p, r))


@pytest.mark.parametrize("n", [0, 4, 5])
def test_best_of_n_needs_a_further_draw(n: int) -> None:
    with pytest.raises(ValueError, match="further draw"):
        best_of_n_win_rate([1, 2, 3, 4], [1, 2, 3, 4], n)


# --- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_coverage() -> None:
    """A 95% interval covers in about 95% of trials: 300 of them, 60 skewed prompts each."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        figure = bootstrap([rng.exponential(size=60)], lambda mean: mean, 300, seed=trial)
        covered += figure.low <= 1.0 <= figure.high
        assert figure.low <= figure.value <= figure.high
    assert 0.89 <= covered / 300 <= 0.98


def test_bootstrap_width() -> None:
    """The interval is ±1.96 standard errors of the mean when the mean is nearly normal."""
    values = np.random.default_rng(1).normal(size=900)
    figure = bootstrap([values], lambda mean: mean)
    expected = 1.96 * values.std() / 30
    assert figure.value == pytest.approx(values.mean())
    assert (figure.high - figure.low) / 2 == pytest.approx(expected, rel=0.1)


def test_bootstrap_is_deterministic_by_seed() -> None:
    values = np.random.default_rng(2).random(50)
    first, again, other = (bootstrap([values], lambda mean: mean, 200, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_bootstrap_resamples_columns_together() -> None:
    """Figures of one prompt stay together: a difference of equal columns has no spread at all."""
    values = np.random.default_rng(3).random(40)
    figure = bootstrap([values, values + 2], lambda a, b: b - a)
    assert (figure.low, figure.high) == pytest.approx((2, 2))


# --- the evaluator --------------------------------------------------------------------------------


def group(
    name: str, rewards: Sequence[float], lengths: Sequence[int] | None = None, **metrics: Any
) -> Group:
    size = len(rewards)
    return Group(
        prompt_id=name,
        prompt=name,
        prompt_token_ids=(1,),
        completions=("x",) * size,
        token_ids=tuple((2,) * length for length in lengths or [1] * size),
        logprobs=(-1.0,) * size,
        finish_reasons=("stop",) * size,
        rewards=tuple(rewards),
        metrics={key: tuple(values) for key, values in metrics.items()},
    )


# k = 2 and n = 2, so four base completions; `other` is a second reward.
BASE = [
    group("a", [0, 1, 2, 3], [1, 2, 3, 4], other=[3, 2, 1, 0]),
    group("b", [5, 5, 1, 0], [4, 4, 2, 2], other=[0, 0, 0, 1]),
]
OURS = [
    group("a", [2, 0.5], [5, 3], kl=[0.5, 0.7], other=[4, 2.5]),
    group("b", [5, 6], [1, 1], kl=[0.2, 0.2], other=[0, 1]),
]
EVALUATOR = Evaluator(BASE, n=2, k=2, resamples=50)


def values(figures: Sequence[Figure | None]) -> list[float]:
    return [figure.value for figure in figures if figure is not None]


def test_model_figures_by_hand() -> None:
    got = EVALUATOR.model(OURS)
    # a: 2 beats 0 and 1, 0.5 beats 0 of them; b: 5 ties twice, 6 wins twice.
    win = np.mean([3 / 4, 3 / 4])
    assert got.win_rate.value == pytest.approx(win)
    assert got.kl.value == pytest.approx((0.6 + 0.2) / 2)
    assert got.length.value == pytest.approx((4 + 1) / 2)
    assert got.tokens_per_answer.value == got.length.value
    assert got.length_change.value == pytest.approx(2.5 - (2.5 + 3) / 2)
    # a: 4 beats 3 and 2, 2.5 beats 2; b: 0 ties twice, 1 wins twice.
    assert {name: it.value for name, it in got.win_rate_by.items()} == {
        "other": pytest.approx((3 / 4 + 3 / 4) / 2)
    }


def test_recovered_and_efficiency_definitions() -> None:
    """Ratios of means over prompts: the gain over ½ that best-of-n gets, and least KL over KL."""
    got = EVALUATOR.model(OURS)
    best = np.mean(
        [enumerated_best_of_n(it.rewards, it.rewards, 2) for it in BASE if it.rewards is not None]
    )
    assert got.recovered.value == pytest.approx((0.75 - 0.5) / (best - 0.5))
    assert got.kl_efficiency is not None
    assert got.kl_efficiency.value == pytest.approx(float(optimal_kl(0.75)) / 0.4)


def test_best_of_n_figures_by_hand() -> None:
    got = EVALUATOR.best_of_n()
    wins = [enumerated_best_of_n(it.rewards or (), it.rewards or (), 2) for it in BASE]
    others = [enumerated_best_of_n(it.rewards or (), it.metrics["other"], 2) for it in BASE]
    assert got.win_rate.value == pytest.approx(np.mean(wins))
    assert got.win_rate_by["other"].value == pytest.approx(np.mean(others))
    assert got.kl == Figure.exact(BestOfN(2).kl())
    assert got.recovered == Figure.exact(1.0)
    # Of four, the best of a random pair is the i-th smallest with chance 0, 1/6, 2/6, 3/6.
    length_a, length_b = (0 + 2 + 6 + 12) / 6, (0 + 2 + 8 + 12) / 6
    assert got.length.value == pytest.approx((length_a + length_b) / 2)
    assert got.length_change.value == pytest.approx((length_a + length_b) / 2 - (2.5 + 3) / 2)
    assert got.tokens_per_answer.value == pytest.approx(2 * (2.5 + 3) / 2)
    assert got.kl_efficiency is not None
    least = float(optimal_kl(np.mean(wins)))
    assert got.kl_efficiency.value == pytest.approx(least / BestOfN(2).kl())


def test_base_model_figures() -> None:
    got = EVALUATOR.base_model()
    assert (got.win_rate, got.kl, got.recovered) == tuple(map(Figure.exact, (0.5, 0.0, 0.0)))
    assert got.kl_efficiency is None
    assert got.length_change == Figure.exact(0.0)
    assert got.length.value == got.tokens_per_answer.value == pytest.approx((2.5 + 3) / 2)
    assert got.win_rate_by == {"other": Figure.exact(0.5)}


def test_best_of_n_as_a_model_recovers_everything() -> None:
    """The best of n fresh draws, handed in as a model, recovers 1 and spends about what it must."""
    rng = np.random.default_rng(0)
    n, k, prompts = 4, 8, 400
    base = [group(str(i), rng.normal(size=n + k)) for i in range(prompts)]
    kl = [BestOfN(n).kl()] * k
    ours = [group(str(i), rng.normal(size=(k, n)).max(axis=1), kl=kl) for i in range(prompts)]
    evaluator = Evaluator(base, n=n, k=k, resamples=300)
    got, theory = evaluator.model(ours), evaluator.best_of_n()
    assert theory.win_rate.value == pytest.approx(BestOfN(n).win_rate(), abs=0.02)
    assert got.recovered.value == pytest.approx(1, abs=0.05)
    assert got.recovered.low < 1 < got.recovered.high
    efficiency = float(optimal_kl(BestOfN(n).win_rate())) / BestOfN(n).kl()
    assert got.kl_efficiency is not None
    assert got.kl_efficiency.value == pytest.approx(efficiency, abs=0.15)


def test_base_as_a_model_recovers_nothing() -> None:
    rng = np.random.default_rng(1)
    base = [group(str(i), rng.normal(size=8)) for i in range(300)]
    ours = [group(str(i), rng.normal(size=4), kl=[0.0] * 4) for i in range(300)]
    got = Evaluator(base, n=4, k=4, resamples=200).model(ours)
    assert got.win_rate.low < 0.5 < got.win_rate.high
    assert got.recovered.value == pytest.approx(0, abs=0.1)
    assert got.kl_efficiency is not None
    assert got.kl_efficiency.value == 0  # no KL was measured: nothing was spent, nothing gained


def test_losing_model_has_no_efficiency() -> None:
    ours = [group("a", [-1, -1], kl=[3, 3], other=[0, 0]),
            group("b", [-1, 5], kl=[3, 3], other=[0, 0])]  # fmt: skip
    got = EVALUATOR.model(ours)
    assert got.recovered.value < 0
    assert got.kl_efficiency == Figure.exact(0.0)


def test_useless_reward() -> None:
    """All rewards tie: nothing can be won or recovered, and nothing divides by zero."""
    base = [group(name, [1.0] * 4) for name in "ab"]
    ours = [group(name, [1.0] * 2, kl=[0.1] * 2) for name in "ab"]
    evaluator = Evaluator(base, n=2, k=2, resamples=20)
    assert evaluator.best_of_n().win_rate == Figure.exact(0.5)
    got = evaluator.model(ours)
    assert (got.win_rate, got.recovered) == (Figure.exact(0.5), Figure.exact(0.0))


@pytest.mark.parametrize("ours", [OURS[::-1], OURS[:1], []], ids=["order", "missing", "none"])
def test_different_prompts(ours: list[Group]) -> None:
    with pytest.raises(ValueError, match="different prompts"):
        EVALUATOR.model(ours)


def test_to_json_is_plain() -> None:
    got = EVALUATOR.model(OURS).to_json()
    assert set(got["kl"]) == {"value", "low", "high"}
    assert got["win_rate_by"]["other"]["value"] == 0.75


# --- KL of a policy enumerated in full ------------------------------------------------------------

VOCABULARY, END, LONGEST = 5, 0, 3
PROMPT = (3, 1)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        pad_token_id=END, eos_token_id=END, bos_token_id=None, initializer_range=0.8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def every_completion() -> list[tuple[int, ...]]:
    """All the policy can draw: up to LONGEST tokens, ended by END or cut off."""
    words = [token for token in range(VOCABULARY) if token != END]
    ended = [
        (*prefix, END) for k in range(LONGEST) for prefix in itertools.product(words, repeat=k)
    ]
    return ended + list(itertools.product(words, repeat=LONGEST))


@torch.inference_mode()
def log_prob(model: LlamaForCausalLM, completion: tuple[int, ...], temperature: float) -> float:
    """Token by token, without batching, padding or a mask."""
    total = 0.0
    for t, token in enumerate(completion):
        logits = model(torch.tensor([[*PROMPT, *completion[:t]]])).logits[0, -1].double()
        total += float((logits / temperature).log_softmax(dim=-1)[token])
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_batch_tokens", [16_384, 12])
def test_completion_kls_are_unbiased(temperature: float, max_batch_tokens: int) -> None:
    """Their mean under the policy is Σ_y π(y) ln[π(y)/π0(y)] over all completions, exactly."""
    policy, base = tiny_llama(0), tiny_llama(1)
    completions = every_completion()
    ours = np.array([log_prob(policy, y, temperature) for y in completions])
    theirs = np.array([log_prob(base, y, temperature) for y in completions])
    assert np.exp(ours).sum() == pytest.approx(1, abs=1e-5)  # the enumeration is complete
    size = len(completions)
    everything = Group(
        "p", "p", PROMPT, ("",) * size, tuple(completions), (0.0,) * size, ("stop",) * size
    )
    (kls,) = completion_kls(
        policy, base, [everything], temperature=temperature, max_batch_tokens=max_batch_tokens
    )
    exact = float(np.exp(ours) @ (ours - theirs))
    assert exact > 0.05  # the two models differ enough for the test to mean something
    assert float(np.exp(ours) @ np.array(kls)) == pytest.approx(exact, rel=1e-4)
    # Rao-Blackwellised: less spread than the plain log-ratio, and never below 0.
    assert min(kls) >= 0
    spread = np.exp(ours) @ (np.array(kls) - exact) ** 2
    assert spread < np.exp(ours) @ (ours - theirs - exact) ** 2


def test_completion_kls_of_the_base_itself() -> None:
    model = tiny_llama(0)
    groups = [
        Group("p", "p", PROMPT, ("", ""), ((1, 0), (2, 2, 2)), (0.0,) * 2, ("stop", "length")),
        Group("q", "q", (1,), ("",), ((4, 0),), (0.0,), ("stop",)),
    ]
    got = completion_kls(model, model, groups)
    assert [len(kls) for kls in got] == [2, 1]
    assert all(kl == pytest.approx(0, abs=1e-6) for kls in got for kl in kls)
