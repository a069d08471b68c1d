"""Adaptive n against enumerated subsets, every sequence of draws, and best-of-n."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bonbon
from bonbon.config.sampling import SamplingConfig
from bonbon.decoding import AdaptiveN, BestOfN
from bonbon.decoding.adaptive import expected_gain
from bonbon.groups.group import Group, Prompt
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Candidates, Cost
from bonbon.system.errors import BonbonError
from support.groups import group_of
from support.profiles import quick

few = st.integers(-2, 3).map(float)


# --- the gain -------------------------------------------------------------------------------------


def enumerated_gain(rewards: Sequence[float]) -> float:
    """The mean growth of the best from the first m − 1 of m draws, over all orders of m draws."""
    k = len(rewards)
    m = k // 2 + 1
    grown = [
        max(*rest, last) - max(rest)
        for *rest, last in itertools.permutations(rewards, m)
    ]  # fmt: skip
    return sum(grown) / len(grown) * m / (k + 1)


@quick
@given(st.lists(few, min_size=2, max_size=6))
def test_the_gain_by_enumeration(rewards: list[float]) -> None:
    assert expected_gain(rewards) == pytest.approx(enumerated_gain(rewards))


@quick
@given(st.lists(few, min_size=2, max_size=20), st.floats(-50, 50), st.floats(0.01, 100))
def test_the_gain_has_the_reward_s_unit(rewards: list[float], shift: float, scale: float) -> None:
    moved = [shift + scale * r for r in rewards]
    assert expected_gain(moved) == pytest.approx(scale * expected_gain(rewards), abs=1e-9 * scale)


def test_the_gain_of_what_says_nothing() -> None:
    assert expected_gain([2.5] * 9) == 0
    assert expected_gain([1.0]) == math.inf
    assert expected_gain([]) == math.inf


@pytest.mark.parametrize("k", [4, 9, 30])
def test_the_gain_is_unbiased_for_exponential_rewards(k: int) -> None:
    """E[max of k + 1] − E[max of k] = 1/(k + 1) for rewards of Exp(1)."""
    rng = np.random.default_rng(k)
    found = [expected_gain(draws) for draws in rng.exponential(size=(4000, k))]
    error = float(np.std(found)) / len(found) ** 0.5
    assert abs(np.mean(found) - 1 / (k + 1)) < 4 * error
    assert error < 0.05 / (k + 1)


# --- every sequence of draws ----------------------------------------------------------------------

# A completion is its outcome's name; the prompt names its whole sequence of draws.
OUTCOMES = {"a": (0.5, 0.0, 2), "b": (0.3, 1.0, 4), "c": (0.2, 5.0, 9)}
PROBABILITY = {name: p for name, (p, _, _) in OUTCOMES.items()}
REWARD = {name: r for name, (_, r, _) in OUTCOMES.items()}
LENGTH = {name: tokens for name, (_, _, tokens) in OUTCOMES.items()}


def named_reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
    return np.array([REWARD[name] for name in completions])


class Listed:
    """A source whose prompts list their draws; draws written `-` fail."""

    def __init__(self, n: int) -> None:
        self.config = SamplingConfig(n=n)
        self.asked: list[tuple[str, range]] = []

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        self.asked += [(p.prompt_id, numbers) for p, numbers in zip(prompts, ks, strict=True)]
        return [self._drawn(p, numbers) for p, numbers in zip(prompts, ks, strict=True)]

    def _drawn(self, prompt: EncodedPrompt, numbers: range) -> Candidates:
        drawn = [name for name in (str(prompt.prompt)[k] for k in numbers) if name != "-"]
        ids = tuple((7,) * LENGTH[name] for name in drawn)
        group = group_of(prompt.prompt_id, prompt.prompt, drawn, token_ids=ids)
        return Candidates(group, Cost(sum(group.lengths()), prefilled=3, seconds=0.5))

    def embed(self, group: Group) -> Any:
        raise NotImplementedError


def listed(sequences: Sequence[str]) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"p{i}", text, (1, 2, 3)) for i, text in enumerate(sequences)]


def stop_of(sequence: str, price: float, min_n: int, batch: int) -> int:
    """How many draws are made, by the rule as it is written down."""
    made = min(min_n, len(sequence))
    while made < len(sequence):
        drawn = sequence[:made]
        tokens = sum(LENGTH[name] for name in drawn) / made
        if enumerated_gain([REWARD[name] for name in drawn]) < price * tokens:
            break
        made = min(made + batch, len(sequence))
    return made


@pytest.mark.parametrize("price", [0.02, 0.07, 0.2])
@pytest.mark.parametrize(("n", "min_n", "batch"), [(3, 2, 1), (4, 2, 1), (4, 3, 1), (5, 2, 2)])
def test_the_law_of_the_answer_and_the_number_of_draws(
    price: float, n: int, min_n: int, batch: int
) -> None:
    """Over every sequence of n draws, all prompts together; none depends on its neighbours."""
    sequences = ["".join(names) for names in itertools.product(OUTCOMES, repeat=n)]
    strategy = AdaptiveN(price=price, min_n=min_n, batch=batch)
    found = strategy.generate(listed(sequences), Listed(n), named_reward)
    law = dict.fromkeys(OUTCOMES, 0.0)
    expected_law = dict.fromkeys(OUTCOMES, 0.0)
    draws = expected_draws = 0.0
    for sequence, generation in zip(sequences, found, strict=True):
        weight = math.prod(PROBABILITY[name] for name in sequence)
        made = stop_of(sequence, price, min_n, batch)
        assert generation.group.completions == tuple(sequence[:made])
        law[generation.completion] += weight
        expected_law[max(sequence[:made], key=lambda name: REWARD[name])] += weight
        draws += weight * generation.group.n
        expected_draws += weight * made
    assert law == pytest.approx(expected_law)
    assert draws == pytest.approx(expected_draws)
    assert sum(law.values()) == pytest.approx(1)


def test_prices_span_from_all_draws_to_the_fewest() -> None:
    """The mean number of draws falls with the price, and lies between its ends."""
    sequences = ["".join(names) for names in itertools.product(OUTCOMES, repeat=4)]
    means = []
    for price in (0.0, 0.02, 0.1, 10.0):
        found = AdaptiveN(price=price, min_n=2, batch=1).generate(
            listed(sequences), Listed(4), named_reward
        )  # fmt: skip
        means.append(np.mean([generation.group.n for generation in found]))
    assert means[0] == 4
    assert means[-1] == 2
    assert means[0] > means[1] > means[2] > means[3]


def test_cost_adds_up_over_rounds() -> None:
    source = Listed(4)
    (found,) = AdaptiveN(price=0.01, min_n=2, batch=1).generate(
        listed(["acbc"]), source, named_reward
    )
    assert [numbers for _, numbers in source.asked] == [range(2), range(2, 3), range(3, 4)]
    assert found.cost.generated == 2 + 9 + 4 + 9
    assert found.cost.prefilled == 3 * 3
    assert found.cost.reward_calls == 4
    assert found.cost.seconds >= 3 * 0.5
    assert found.chosen == 1  # of the tied ones the first drawn


def test_tied_rewards_stop_at_once_and_a_free_draw_never() -> None:
    for price, made in ((1e-12, 3), (0.0, 6)):
        (found,) = AdaptiveN(price=price, min_n=3, batch=1).generate(
            listed(["aaaaac"]), Listed(6), named_reward
        )  # fmt: skip
        assert found.group.n == made


def test_only_open_prompts_are_drawn_on() -> None:
    source = Listed(4)
    AdaptiveN(price=0.05, min_n=2, batch=1).generate(listed(["aabc", "acaa"]), source, named_reward)
    assert [name for name, _ in source.asked[:2]] == ["p0", "p1"]
    assert {name for name, _ in source.asked[2:]} == {"p1"}


def test_failed_draws_are_not_drawn_again() -> None:
    """They use up n, do not count towards min_n, and the end comes however many fail."""
    source = Listed(6)
    (found,) = AdaptiveN(price=10.0, min_n=3, batch=1).generate(
        listed(["a--bca"]), source, named_reward
    )
    assert found.group.completions == ("a", "b", "c")
    assert [numbers for _, numbers in source.asked] == [range(3), range(3, 4), range(4, 5)]
    (found,) = AdaptiveN(price=10.0, min_n=2, batch=1).generate(
        listed(["a-----"]), Listed(6), named_reward
    )
    assert found.group.completions == ("a",)
    assert found.chosen == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_draws_than_the_first_round(n: int) -> None:
    (found,) = AdaptiveN(price=1.0, min_n=4, batch=1).generate(
        listed(["bca"[:n]]), Listed(n), named_reward
    )
    assert found.group.n == n


# --- beside best-of-n -----------------------------------------------------------------------------


def uneven(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    return [len(set(text)) + sum(map(ord, text)) / 1e5 for text in completions]


def test_at_price_0_it_is_best_of_n(tiny_model: Path) -> None:
    sampling = SamplingConfig(n=7, max_new_tokens=6, seed=3)
    prompts: list[Prompt] = ["Once", "A cat sat", "Two"]
    for price, whole in ((0.0, True), (0.01, False)):
        ours = bonbon.generate(
            prompts,
            str(tiny_model),
            uneven,
            AdaptiveN(price=price, min_n=2, batch=1),
            sampling=sampling,
        )
        theirs = bonbon.generate(prompts, str(tiny_model), uneven, BestOfN(), sampling=sampling)
        assert len(ours) == len(prompts)
        for a, b in zip(ours, theirs, strict=True):
            assert a.group.completions == b.group.completions[: a.group.n]
            if whole:
                assert a.group == b.group
                assert a.chosen == b.chosen
                assert (a.cost.generated, a.cost.prefilled) == (b.cost.generated, b.cost.prefilled)


def test_misuse() -> None:
    with pytest.raises(ValueError, match="reward"):
        AdaptiveN(price=0.1).generate(listed(["a"]), Listed(1), None)
    for settings_ in ({}, {"price": -1}, {"price": 1, "min_n": 1}, {"price": 1, "batch": 0}):
        with pytest.raises(ValueError, match=r"price|min_n|batch"):
            AdaptiveN(**settings_)
    with pytest.raises(BonbonError, match="must be finite"):
        AdaptiveN(price=0.1).generate(listed(["a"]), Listed(1), lambda p, c: [math.nan] * len(c))
