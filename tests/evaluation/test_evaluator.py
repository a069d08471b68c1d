"""The evaluator against figures worked out by hand, and against what theory says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bonbon.evaluation import Draws, Evaluator, Figure, best_of_n_win_rate, bootstrap, kl_efficiency
from bonbon.evaluation.efficiency import recovered_share
from bonbon.groups.group import Group
from bonbon.stages.evaluate import _equal_win_rate
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.discrete import best_of_n_pmf, kl_pmf, win_rate_pmf
from bonbon.tilt.exponential import optimal_kl
from support.enumeration import enumerated_best_of_n

Floats = NDArray[np.float64]


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
EVALUATOR = Evaluator(BASE, n=2, k=2, resamples=50, rewards=("other",))


def values(figures: Sequence[Figure | None]) -> list[float]:
    return [figure.value for figure in figures if figure is not None]


def test_model_figures_by_hand() -> None:
    got = EVALUATOR.model(Draws(OURS))
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
    got = EVALUATOR.model(Draws(OURS))
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


@pytest.mark.slow
def test_best_of_n_as_a_model_recovers_everything() -> None:
    """The best of n fresh draws, handed in as a model, recovers 1 and spends about what it must."""
    rng = np.random.default_rng(0)
    n, k, prompts = 4, 8, 400
    base = [group(str(i), rng.normal(size=n + k)) for i in range(prompts)]
    kl = [BestOfN(n).kl()] * k
    ours = [group(str(i), rng.normal(size=(k, n)).max(axis=1), kl=kl) for i in range(prompts)]
    evaluator = Evaluator(base, n=n, k=k, resamples=300)
    got, theory = evaluator.model(Draws(ours)), evaluator.best_of_n()
    assert theory.win_rate.value == pytest.approx(BestOfN(n).win_rate(), abs=0.02)
    assert got.recovered.value == pytest.approx(1, abs=0.05)
    assert got.recovered.low < 1 < got.recovered.high
    efficiency = float(optimal_kl(BestOfN(n).win_rate())) / BestOfN(n).kl()
    assert got.kl_efficiency is not None
    assert got.kl_efficiency.value == pytest.approx(efficiency, abs=0.15)


@pytest.mark.slow
def test_base_as_a_model_recovers_nothing() -> None:
    rng = np.random.default_rng(1)
    base = [group(str(i), rng.normal(size=8)) for i in range(300)]
    ours = [group(str(i), rng.normal(size=4), kl=[0.0] * 4) for i in range(300)]
    got = Evaluator(base, n=4, k=4, resamples=200).model(Draws(ours))
    assert got.win_rate.low < 0.5 < got.win_rate.high
    assert got.recovered.value == pytest.approx(0, abs=0.1)
    assert got.kl_efficiency is not None
    assert got.kl_efficiency.value == 0  # no KL was measured: nothing was spent, nothing gained


def test_losing_model_has_no_efficiency() -> None:
    ours = [group("a", [-1, -1], kl=[3, 3], other=[0, 0]),
            group("b", [-1, 5], kl=[3, 3], other=[0, 0])]  # fmt: skip
    got = EVALUATOR.model(Draws(ours))
    assert got.recovered.value < 0
    assert got.kl_efficiency == Figure.exact(0.0)


def test_useless_reward() -> None:
    """All rewards tie: nothing can be won or recovered, and nothing divides by zero."""
    base = [group(name, [1.0] * 4) for name in "ab"]
    ours = [group(name, [1.0] * 2, kl=[0.1] * 2) for name in "ab"]
    evaluator = Evaluator(base, n=2, k=2, resamples=20)
    assert evaluator.best_of_n().win_rate == Figure.exact(0.5)
    got = evaluator.model(Draws(ours))
    assert (got.win_rate, got.recovered) == (Figure.exact(0.5), Figure.exact(0.0))


@pytest.mark.parametrize("ours", [OURS[::-1], OURS[:1], []], ids=["order", "missing", "none"])
def test_different_prompts(ours: list[Group]) -> None:
    with pytest.raises(ValueError, match="different prompts"):
        EVALUATOR.model(Draws(ours))


def test_to_json_is_plain() -> None:
    got = EVALUATOR.model(Draws(OURS)).to_json()
    assert set(got["kl"]) == {"value", "low", "high"}
    assert got["win_rate_by"]["other"]["value"] == 0.75


def test_rounding_is_no_gain() -> None:
    """The base never gets the reward and the model does: best-of-n gains nothing, but for bits."""
    base = [group(str(i), [0.0] * 7) for i in range(20)]
    ours = [group(str(i), [0.0, 1.0, 1.0, 0.0], kl=[0.1] * 4) for i in range(20)]
    evaluator = Evaluator(base, n=3, k=4, resamples=50)
    best, got = evaluator.best_of_n(), evaluator.model(Draws(ours))
    assert best.win_rate.value == pytest.approx(0.5)
    assert got.win_rate.value == pytest.approx(0.75)
    assert got.recovered == Figure.exact(0.0)
    assert best.kl_efficiency == Figure.exact(0.0)
    assert _equal_win_rate({"best-of-3": best, "ours": got}) is None


def test_infinite_kls_have_no_figure() -> None:
    kl = {"kl": [np.inf, 1.0], "kl_plain": [1.0, 1.0], "kl_k3": [np.nan, 1.0]}
    ours = [group(name, [2.0, 3.0], other=[0, 0], **kl) for name in "ab"]
    got = EVALUATOR.model(Draws(ours, forward=ours))
    assert (got.kl, got.kl_efficiency, got.forward_kl, got.kl_estimates) == (None, None, None, {})


# --- several policies, metrics and decodings ------------------------------------------------------


def test_best_of_two_of_a_model_by_hand() -> None:
    """Weights by rank on its draws; KL = KL(best-of-2 ‖ model) + the log-ratio of what it keeps."""
    ours = [
        group("a", [0, 2, 4], [3, 6, 9], kl=[0] * 3, kl_plain=[1, 2, 3], kl_k3=[0] * 3,
              other=[0] * 3),
        group("b", [1, 1, 9], [2, 4, 6], kl=[0] * 3, kl_plain=[0, 2, 5], kl_k3=[0] * 3,
              other=[0] * 3),
    ]  # fmt: skip
    got = EVALUATOR.model(Draws(ours, best_of=2))
    # Of three, the best of a random pair is the middle one with chance 1/3, the largest with 2/3;
    # in b two share the lower places.
    assert got.length.value == pytest.approx(((6 + 2 * 9) / 3 + (0.5 * (2 + 4) + 2 * 6) / 3) / 2)
    assert got.win_rate.value == pytest.approx(((1 + 2 * 1) / 3 + (0 + 2 * 1) / 3) / 2)
    plain = ((2 + 2 * 3) / 3 + (0.5 * (0 + 2) + 2 * 5) / 3) / 2
    assert got.kl is not None
    assert got.kl.value == pytest.approx(plain + BestOfN(2).kl())
    assert set(got.kl_estimates) == {"plain"}
    assert got.tokens_per_answer.value == pytest.approx(2 * (6 + 4) / 2)
    assert got.best_of == 2
    assert "self_bleu" not in got.drift  # it needs k answers of the policy


def test_pairs_by_hand() -> None:
    worse = [
        group("a", [0, 0], kl=[0, 0], other=[0, 0]), group("b", [5, 7], kl=[0, 0], other=[0, 0])
    ]  # fmt: skip
    (pair,) = EVALUATOR.pairs({"ours": Draws(OURS), "worse": Draws(worse)})
    assert (pair.ours, pair.theirs) == ("ours", "worse")
    # a: both beat both; b: 5 ties 5 and loses to 7, 6 beats 5 and loses to 7.
    assert pair.win_rate.value == pytest.approx((1 + (0.5 + 0 + 1 + 0) / 4) / 2)
    # Against the base's [0, 1] and [5, 5]: worse wins (½, 0 → ¼) and (½, 1 → ¾).
    assert pair.difference.value == pytest.approx(0.75 - 0.5)


def test_drift_at_an_equal_win_rate() -> None:
    """Mixed with the base down to half of the gain, a model has half of its drift."""
    rng = np.random.default_rng(3)
    base = [group(str(i), rng.normal(size=4), list(rng.integers(1, 9, 4))) for i in range(80)]
    ours = [group(str(i), rng.normal(1, 1, 2), list(rng.integers(5, 13, 2))) for i in range(80)]
    evaluator = Evaluator(base, n=2, k=2, resamples=100)
    draws = Draws(ours)
    whole = evaluator.model(draws)
    target = 0.5 + (whole.win_rate.value - 0.5) / 2
    half = evaluator.drift_at(draws, target)["length"]
    assert half is not None
    assert half.value == pytest.approx(whole.length_change.value / 2)
    assert evaluator.drift_at(draws, whole.win_rate.value + 0.01)["length"] is None


def test_length_control_takes_out_what_length_buys() -> None:
    """A reward that is the length: the longer policy wins, and by no more than its length."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(5, 25, (150, 6))
    base = [group(str(i), row + 0.0, list(row)) for i, row in enumerate(lengths)]
    longer = rng.integers(15, 35, (150, 2))
    ours = [group(str(i), row + 0.0, list(row)) for i, row in enumerate(longer)]
    evaluator = Evaluator(base, n=4, k=2, resamples=100)
    controlled = evaluator.length_controlled({"longer": Draws(ours)})["longer"]
    plain = evaluator.model(Draws(ours)).win_rate
    assert plain.value > 0.85
    assert abs(controlled.value - 0.5) < 0.15
    best = evaluator.length_controlled({"best": evaluator.best_of_n_draws})["best"]
    assert best.value < evaluator.best_of_n().win_rate.value


# --- against a policy enumerated in full ----------------------------------------------------------


def enumerated_group(name: str, p: Floats, rewards: Floats) -> Group:
    """Every outcome once, with its log-probability."""
    size = len(p)
    return Group(
        prompt_id=name,
        prompt=name,
        prompt_token_ids=(1,),
        completions=tuple(map(str, range(size))),
        token_ids=tuple((index + 2,) for index in range(size)),
        logprobs=tuple(np.log(p)),
        finish_reasons=("stop",) * size,
        rewards=tuple(rewards),
    )


def test_the_exact_kl_of_best_of_n_where_all_outcomes_are_drawn() -> None:
    rng = np.random.default_rng(5)
    laws = [rng.dirichlet(np.ones(8)) for _ in range(3)]
    rewards = [np.array([0, 0, 1, 2, 3, 4, 4, 5.0])] * 3
    base = [
        enumerated_group(str(i), p, r) for i, (p, r) in enumerate(zip(laws, rewards, strict=True))
    ]
    found = Evaluator(base, n=4, k=4, resamples=100).best_of_n_kl()
    exact = [kl_pmf(best_of_n_pmf(p, r, 4), p) for p, r in zip(laws, rewards, strict=True)]
    assert found.exact == pytest.approx(np.mean(exact))
    assert found.exact < found.bound == BestOfN(4).kl()
    partly = [group.part(0, 7) for group in base]
    assert Evaluator(partly, n=3, k=4, resamples=100).best_of_n_kl().exact is None


def test_beirami_s_estimate_is_between_exact_and_bound() -> None:
    """On draws from a small law: the methods note's example has 0.5401, 0.5551 and 0.6363."""
    rng = np.random.default_rng(6)
    p, rewards = np.full(10, 0.1), np.arange(10.0)
    whole = enumerated_group("p", p, rewards)
    base = []
    for index in range(300):
        drawn = [whole.part(i, i + 1) for i in rng.choice(10, size=8, p=p)]
        base.append(
            Group(
                str(index), "p", (1,), *(sum((getattr(g, name) for g in drawn), ()) for name in
                ("completions", "token_ids", "logprobs", "finish_reasons", "rewards"))
            )
        )  # fmt: skip
    found = Evaluator(base, n=4, k=4, resamples=100).best_of_n_kl()
    exact = kl_pmf(best_of_n_pmf(p, rewards, 4), p)
    assert found.exact is None
    assert exact < found.beirami.value < found.bound


@pytest.mark.slow
def test_intervals_of_ratios_cover() -> None:
    """Recovered and KL efficiency, on 600 data sets of 120 prompts of tabular policies.

    A prompt's base law has 6 outcomes with the rewards 0..5 and its policy is that law tilted by
    its own amount; both are drawn from 4 times, best-of-3 is estimated from 7 draws.
    """
    rng = np.random.default_rng(7)
    prompts, sets, pool = 120, 600, 5_000
    rewards = np.arange(6.0)
    laws = rng.dirichlet(np.ones(6), size=pool)
    tilted = laws * np.exp(rng.uniform(0.1, 0.6, size=(pool, 1)) * rewards)
    tilted /= tilted.sum(axis=1, keepdims=True)
    kls = np.sum(tilted * np.log(tilted / laws), axis=1)
    base, ours = _drawn(rng, laws, 7), _drawn(rng, tilted, 4)
    gap = ours[:, :, None] - base[:, None, :4]
    wins = ((gap > 0) + 0.5 * (gap == 0)).mean(axis=(1, 2))
    best_wins = np.array([best_of_n_win_rate(row, row, 3) for row in base])
    spent = kls * rng.uniform(0.5, 1.5, pool)  # measured with error
    win = np.mean([win_rate_pmf(q, p, rewards) for p, q in zip(laws, tilted, strict=True)])
    best = np.mean([win_rate_pmf(best_of_n_pmf(p, rewards, 3), p, rewards) for p in laws])
    truth = np.array([float(recovered_share(win, best)), float(kl_efficiency(win, kls.mean()))])
    covered = np.zeros(2)
    for _ in range(sets):
        chosen = rng.integers(0, pool, prompts)  # prompts are a sample too
        figures = (
            bootstrap([wins[chosen], best_wins[chosen]], recovered_share, 600),
            bootstrap([wins[chosen], spent[chosen]], kl_efficiency, 600),
        )
        covered += [it.low <= value <= it.high for it, value in zip(figures, truth, strict=True)]
    assert np.all((covered / sets > 0.93) & (covered / sets < 0.97)), covered / sets


def _drawn(rng: np.random.Generator, laws: Floats, count: int) -> Floats:
    """Outcomes of shape (prompts, count) by the inverse CDF; an outcome is its reward."""
    uniforms = rng.random((len(laws), count))
    below = uniforms[:, :, None] > laws.cumsum(axis=1)[:, None, :]
    return np.minimum(below.sum(axis=2), laws.shape[1] - 1).astype(np.float64)


def test_ties_and_what_a_further_reward_takes_away() -> None:
    got = EVALUATOR.model(Draws(OURS))
    # a: of 2 and 0.5 none ties with 0 or 1; b: 5 ties twice with 5 and 5, 6 never.
    assert got.tie_rate is not None
    assert got.tie_rate.value == pytest.approx((0 + 0.5) / 2)
    assert got.win_rate_loss_by["other"].value == pytest.approx(
        got.win_rate.value - got.win_rate_by["other"].value
    )
