"""Length-controlled win rates against AlpacaEval's published ones, closed forms and scipy.optimize.

The made-up data follow the model that is fitted, so the right answer is known; the intervals are
held to a jackknife, to the textbook's t interval, and to their coverage in simulation.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from bonbon.evaluation.length_control import (
    RIDGE,
    LengthControlled,
    _LengthEffects,
    _shared,
    length_controlled_win_rate,
)
from support.profiles import brief as quick

Floats = NDArray[np.float64]

seeds = st.integers(0, 10_000)


def values(result: LengthControlled) -> Floats:
    return np.array([figure.value for figure in result.win_rates])


def tanh_term(lengths: Floats, baseline_lengths: Floats) -> Floats:
    """tanh of the standardised differences by model, all pairs judged."""
    difference = lengths - baseline_lengths
    axes = tuple(range(1, difference.ndim))
    return np.tanh(difference / difference.std(axis=axes, ddof=1, keepdims=True))


def made_up(
    seed: int,
    models: int = 3,
    instructions: int = 40,
    pairs: int = 2,
    labels: str = "hard",
    together: float = 0.0,
    spread: float = 0.3,
    shorter: float = 70.0,
) -> dict[str, Any]:
    """Judgements that follow the model, and what generated them.

    `together` is the share of an instruction's pairs that are decided by one common draw, `spread`
    that of the φ_m around 1, `shorter` by how much the baseline's answers are the longer ones.
    """
    rng = np.random.default_rng(seed)
    shape = (models, instructions, pairs)
    gamma = rng.standard_normal(instructions)
    theta, psi = np.linspace(-1.2, 0.8, models), np.linspace(1.2, 0.6, models)
    phi = 1.0 + spread * rng.standard_normal(models)
    base = np.round(rng.gamma(4, 50, instructions) + 1)
    # Longer where the baseline is easily beaten.
    longer = 50 * gamma[:, None] - shorter + 120 * rng.standard_normal(shape)
    lengths = np.round(np.maximum(base[:, None] + longer, 1))
    level = theta[:, None] + psi[:, None] * gamma
    x = tanh_term(lengths, base[:, None])
    preferences = expit(level[..., None] + phi[:, None, None] * x)
    if labels == "hard":
        common = rng.random(shape) < together
        draws = np.where(common, rng.random((*shape[:2], 1)), rng.random(shape))
        preferences = (draws < preferences).astype(np.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    return {
        "data": (preferences, lengths, base),
        "gamma": gamma,
        "phi": phi,
        "here": expit(level).mean(axis=1),
        "everywhere": expit(theta[:, None] + np.outer(psi, nodes)) @ weights,
    }


# --- AlpacaEval -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alpaca_eval(shared: Path) -> dict[str, Any]:
    folder = shared / "data" / "alpaca_eval"
    with open(folder / "leaderboard.csv", newline="") as file:
        board = list(csv.DictReader(file))
    row_of = {row["model"]: m for m, row in enumerate(board)}
    preferences, lengths = np.full((2, len(board), 805), np.nan)
    base = np.full(805, np.nan)
    with gzip.open(folder / "preferences.jsonl.gz", "rt") as file:
        for pair in map(json.loads, file):
            m, i = row_of[pair["model"]], pair["instruction"]
            preferences[m, i], lengths[m, i] = pair["preference"], pair["length"]
            base[i] = pair["baseline_length"]
    return {"board": board, "data": (preferences, lengths, base)}


def published(alpaca_eval: dict[str, Any], column: str) -> Floats:
    return np.array([float(row[column]) for row in alpaca_eval["board"]])


def test_alpaca_evals_win_rates(alpaca_eval: dict[str, Any]) -> None:
    means = 100 * np.nanmean(alpaca_eval["data"][0], axis=1)
    np.testing.assert_allclose(means, published(alpaca_eval, "win_rate"), atol=1e-6)


@pytest.mark.slow
def test_alpaca_evals_length_controlled_win_rates(alpaca_eval: dict[str, Any]) -> None:
    theirs = published(alpaca_eval, "length_controlled_winrate")
    result = length_controlled_win_rate(*alpaca_eval["data"])
    ours = 100 * values(result)
    assert spearmanr(ours, theirs).statistic >= 0.99
    assert np.abs(ours - theirs).mean() <= 1.5
    # The baseline is among the models.
    baseline = [row["model"] for row in alpaca_eval["board"]].index("gpt4_1106_preview")
    assert ours[baseline] == 50
    assert result.win_rates[baseline].high - result.win_rates[baseline].low < 1e-3
    assert all(effect > 0 for m, effect in enumerate(result.length_effects) if m != baseline)


def test_alpaca_evals_standard_errors_where_nothing_is_controlled(
    alpaca_eval: dict[str, Any],
) -> None:
    preferences, lengths, _ = alpaca_eval["data"]
    for m in (0, 4):  # models judged on every instruction
        ones = np.ones((1, lengths.shape[1]))
        (figure,) = length_controlled_win_rate(preferences[m : m + 1], ones, ones).win_rates
        error = (logit(figure.high) - logit(figure.low)) / 2 / student_t.ppf(0.975, 804)
        error *= 100 * figure.value * (1 - figure.value)
        assert error == pytest.approx(published(alpaca_eval, "standard_error")[m], rel=1e-4)


# --- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 3, 8])
def test_soft_preferences_of_the_model_itself_are_recovered(models: int) -> None:
    case = made_up(0, models, instructions=800, labels="soft")
    result = length_controlled_win_rate(*case["data"], difficulty=case["gamma"])
    np.testing.assert_allclose(values(result), case["here"], atol=2e-6)
    np.testing.assert_allclose(result.length_effects, case["phi"], atol=2e-4)
    np.testing.assert_array_equal(result.difficulty, case["gamma"])
    raw = case["data"][0].mean(axis=(1, 2))
    assert np.abs(raw - case["here"]).min() > 0.02  # there was something to control


def test_difficulty_is_recovered_from_soft_preferences() -> None:
    case = made_up(1, models=20, instructions=400, labels="soft")
    result = length_controlled_win_rate(*case["data"])
    # ψ = 1 is wrong here and γ is shrunk: close, not exact.
    np.testing.assert_allclose(values(result), case["here"], atol=0.005)
    np.testing.assert_allclose(result.length_effects, case["phi"], atol=0.1)
    assert np.corrcoef(result.difficulty, case["gamma"])[0, 1] > 0.99
    without = length_controlled_win_rate(*case["data"], difficulty=np.zeros(400))
    assert np.abs(values(without) - case["here"]).max() > 0.015


@pytest.mark.slow
def test_hard_labels_come_near_the_truth() -> None:
    case = made_up(2, models=6, instructions=5000, pairs=1)
    for difficulty, near in ((case["gamma"], 0.012), (None, 0.02)):
        result = length_controlled_win_rate(*case["data"], difficulty=difficulty)
        np.testing.assert_allclose(values(result), case["everywhere"], atol=near)
        widths = [figure.high - figure.low for figure in result.win_rates]
        assert max(widths) < 0.04
    raw = case["data"][0].mean(axis=(1, 2))
    assert np.abs(raw - case["everywhere"]).min() > 0.02


def test_equal_variances_give_james_stein() -> None:
    rng = np.random.default_rng(0)
    k, instructions = 7, 30
    influence = rng.standard_normal((k, instructions))
    influence *= np.sqrt(0.04) / np.linalg.norm(influence, axis=1, keepdims=True)
    phi = rng.normal(1, 0.5, k)
    alone = _LengthEffects(phi, influence, np.zeros(k))
    everyone = np.ones(k, dtype=bool)
    shrink = (k - 3) * 0.04 / np.sum((phi - phi.mean()) ** 2)
    expected = phi.mean() + (1 - shrink) * (phi - phi.mean())
    np.testing.assert_allclose(_shared(alone, everyone).values, expected, rtol=1e-12)
    missed = shrink**2 * (phi.var(ddof=1) - 0.04)
    np.testing.assert_allclose(_shared(alone, everyone).prior_variance, missed, rtol=1e-9)
    # The influence is the derivative of the values, B being held.
    moved = (1 - shrink) * influence + shrink * influence.mean(axis=0)
    np.testing.assert_allclose(_shared(alone, everyone).influence, moved, rtol=1e-9)
    equal = _LengthEffects(np.ones(k), influence, np.zeros(k))
    prior = _shared(equal, everyone).prior_variance
    np.testing.assert_allclose(prior, 0, atol=1e-15)  # no spread is found, none is allowed for


def test_a_model_with_few_judgements_borrows_its_length_effect() -> None:
    preferences, lengths, base = made_up(3, models=8, instructions=400, spread=0.1)["data"]
    preferences = preferences.copy()
    preferences[0, 15:] = np.nan
    gamma = np.zeros(400)
    (alone,) = length_controlled_win_rate(
        preferences[:1], lengths[:1], base, difficulty=gamma
    ).length_effects
    effects = length_controlled_win_rate(preferences, lengths, base, difficulty=gamma)
    others = np.mean(effects.length_effects[1:])
    assert abs(effects.length_effects[0] - others) < 0.5 * abs(alone - others)


# --- the fit against scipy.optimize ---------------------------------------------------------------


def cross_entropy(eta: Floats, labels: Floats) -> float:
    return float(np.sum(np.logaddexp(0, eta) - labels * eta))


@pytest.mark.slow
@quick
@given(seeds)
def test_one_models_fit_by_a_generic_minimiser(seed: int) -> None:
    case = made_up(seed, models=1)
    preferences, lengths, base = case["data"]
    x = tanh_term(lengths, base[:, None])[0]
    z = ((case["gamma"] - case["gamma"].mean()) / case["gamma"].std())[:, None]

    def loss(b: Floats) -> float:
        eta = b[0] + b[1] * x + b[2] * z
        return cross_entropy(eta, preferences[0]) + RIDGE / 2 * float(b @ b)

    b = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    result = length_controlled_win_rate(preferences, lengths, base, difficulty=case["gamma"])
    assert values(result)[0] == pytest.approx(expit(b[0] + b[2] * z).mean(), abs=1e-5)
    assert result.length_effects[0] == pytest.approx(b[1], abs=1e-4)


def test_difficulty_by_a_generic_minimiser() -> None:
    preferences, lengths, base = made_up(4, models=4, instructions=25)["data"]
    x = tanh_term(lengths, base[:, None])

    def loss(b: Floats) -> tuple[float, Floats]:
        theta, phi, gamma = b[:4, None, None], b[4:8, None, None], b[8:, None]
        eta = theta + phi * x + gamma
        error = expit(eta) - preferences
        by_pair = [error.sum(axis=(1, 2)), (error * x).sum(axis=(1, 2)), error.sum(axis=(0, 2))]
        scale = np.repeat([RIDGE, 1.0], [8, 25])
        total = cross_entropy(eta, preferences) + 0.5 * float(scale @ b**2)
        return total, np.concatenate(by_pair) + scale * b

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000}
    gamma = minimize(loss, np.zeros(33), jac=True, method="L-BFGS-B", options=options).x[8:]
    expected = (gamma - gamma.mean()) / gamma.std()
    found = length_controlled_win_rate(preferences, lengths, base).difficulty
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- intervals ------------------------------------------------------------------------------------


def test_the_interval_is_students_where_nothing_is_controlled() -> None:
    rng = np.random.default_rng(0)
    preferences = rng.random((1, 30, 4))
    lengths = np.full((1, 30, 4), 7.0)
    (figure,) = length_controlled_win_rate(preferences, lengths, np.full(30, 5.0)).win_rates
    means = preferences[0].mean(axis=1)
    value, error = means.mean(), means.std(ddof=1) / np.sqrt(30)
    margin = student_t.ppf(0.975, 29) * error / (value * (1 - value))
    expected = [value, *expit(logit(value) + np.array([-margin, margin]))]
    np.testing.assert_allclose([figure.value, figure.low, figure.high], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 6])
def test_the_interval_agrees_with_a_jackknife_over_instructions(models: int) -> None:
    case = made_up(6, models, instructions=80, together=0.5, shorter=150)
    preferences, lengths, base = case["data"]

    def without(i: int) -> Floats:
        kept = np.arange(80) != i
        return values(
            length_controlled_win_rate(
                preferences[:, kept], lengths[:, kept], base[kept], difficulty=case["gamma"][kept]
            )
        )

    left_out = np.array([without(i) for i in range(80)])
    error = np.sqrt(79 / 80 * np.sum((left_out - left_out.mean(axis=0)) ** 2, axis=0))
    result = length_controlled_win_rate(*case["data"], difficulty=case["gamma"])
    half_widths = np.array([(f.high - f.low) / 2 for f in result.win_rates])
    np.testing.assert_allclose(half_widths / student_t.ppf(0.975, 77), error, rtol=0.12)


def coverage(data_sets: int, fitted: bool = False, **kind: Any) -> float:
    covered = []
    for seed in range(data_sets):
        case = made_up(1000 + seed, **kind)
        difficulty = None if fitted else case["gamma"]
        result = length_controlled_win_rate(*case["data"], difficulty=difficulty)
        covered += [
            figure.low <= truth <= figure.high
            for figure, truth in zip(result.win_rates, case["everywhere"], strict=True)
        ]
    return float(np.mean(covered))


@pytest.mark.slow
def test_95_percent_of_the_intervals_cover() -> None:
    assert 0.93 <= coverage(500, models=2, instructions=60, pairs=2, together=0.6) <= 0.97


@pytest.mark.slow
def test_95_percent_cover_where_length_effects_are_shared() -> None:
    kind = {"models": 6, "instructions": 80, "pairs": 2, "together": 0.6, "shorter": 150}
    for spread in (0.0, 0.5):
        assert 0.93 <= coverage(80, spread=spread, **kind) <= 0.97


@pytest.mark.slow
def test_95_percent_cover_with_a_fitted_difficulty() -> None:
    kind = {"models": 6, "instructions": 100, "pairs": 1}
    assert 0.93 <= coverage(60, fitted=True, **kind) <= 0.97


# --- invariances ----------------------------------------------------------------------------------


def assert_same(a: LengthControlled, b: LengthControlled, atol: float = 1e-9) -> None:
    for ours, theirs in zip(a.win_rates, b.win_rates, strict=True):
        np.testing.assert_allclose(
            [ours.value, ours.low, ours.high], [theirs.value, theirs.low, theirs.high], atol=atol
        )
    np.testing.assert_allclose(a.length_effects, b.length_effects, atol=100 * atol)


@pytest.mark.slow
@quick
@given(seeds, st.floats(1e-3, 1e3), st.sampled_from([1, 2, 5]))
def test_the_unit_of_length_does_not_matter(seed: int, unit: float, models: int) -> None:
    preferences, lengths, base = made_up(seed, models)["data"]
    assert_same(
        length_controlled_win_rate(preferences, lengths, base),
        length_controlled_win_rate(preferences, unit * lengths, unit * base),
    )


@pytest.mark.slow
@quick
@given(seeds, st.booleans(), st.sampled_from([1, 2, 5]))
def test_swapping_the_sides_mirrors_the_win_rate(seed: int, given: bool, models: int) -> None:
    case = made_up(seed, models)
    preferences, lengths, base = case["data"]
    difficulty = case["gamma"] if given else None
    theirs = np.broadcast_to(base[:, None], lengths.shape)
    there = length_controlled_win_rate(preferences, lengths, theirs, difficulty=difficulty)
    back = length_controlled_win_rate(1 - preferences, theirs, lengths, difficulty=difficulty)
    for one, other in zip(there.win_rates, back.win_rates, strict=True):
        mirrored = [1 - other.value, 1 - other.high, 1 - other.low]
        np.testing.assert_allclose([one.value, one.low, one.high], mirrored, atol=1e-9)
    np.testing.assert_allclose(there.length_effects, back.length_effects, atol=1e-7)


@pytest.mark.slow
@quick
@given(seeds, st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_origin_and_scale_of_difficulty_do_not_matter(seed: int, shift: float, by: float) -> None:
    case = made_up(seed)
    assert_same(
        length_controlled_win_rate(*case["data"], difficulty=case["gamma"]),
        length_controlled_win_rate(*case["data"], difficulty=shift - by * case["gamma"]),
    )


@pytest.mark.slow
@quick
@given(seeds, st.booleans())
def test_the_order_of_models_and_instructions_does_not_matter(seed: int, given: bool) -> None:
    case = made_up(seed, models=5)
    preferences, lengths, base = case["data"]
    rng = np.random.default_rng(seed)
    m, i = rng.permutation(5), rng.permutation(40)
    gamma = case["gamma"] if given else None
    there = length_controlled_win_rate(preferences, lengths, base, difficulty=gamma)
    shuffled = length_controlled_win_rate(
        preferences[m][:, i],
        lengths[m][:, i],
        base[i],
        difficulty=None if gamma is None else gamma[i],
    )
    picked = LengthControlled(
        tuple(there.win_rates[k] for k in m), tuple(there.length_effects[k] for k in m), base
    )
    assert_same(picked, shuffled, atol=1e-8)
    np.testing.assert_allclose(there.difficulty[i], shuffled.difficulty, atol=1e-6)


def test_baseline_lengths_and_pairs_in_every_shape() -> None:
    preferences, lengths, base = made_up(7, pairs=1)["data"]
    three = length_controlled_win_rate(preferences, lengths, base)
    for ours in (base, base[None], np.broadcast_to(base, (3, 40))):
        two = length_controlled_win_rate(preferences[..., 0], lengths[..., 0], ours)
        assert_same(two, three)
    for ours in (base[:, None], np.broadcast_to(base[:, None], lengths.shape)):
        assert_same(length_controlled_win_rate(preferences, lengths, ours), three)
    alike = length_controlled_win_rate(preferences, lengths, 100)
    assert_same(alike, length_controlled_win_rate(preferences, lengths, np.full(40, 100.0)))


def test_what_was_not_judged_is_as_if_it_were_not_there() -> None:
    case = made_up(8, models=3, instructions=50)
    preferences, lengths, base = (array.copy() for array in case["data"])
    preferences[:, 40:], lengths[:, 40:] = np.nan, np.nan
    base[40:] = np.nan
    kept = length_controlled_win_rate(preferences[:, :40], lengths[:, :40], base[:40])
    whole = length_controlled_win_rate(preferences, lengths, base)
    assert_same(whole, kept)
    np.testing.assert_allclose(whole.difficulty[:40], kept.difficulty, atol=1e-7)
    assert not whole.difficulty[40:].any()
    padding = np.full((3, 50, 3), np.nan)  # pairs that only some have
    padded = length_controlled_win_rate(
        np.concatenate([preferences, padding], axis=2),
        np.concatenate([lengths, padding], axis=2),
        base,
    )
    assert_same(padded, kept)


def test_a_model_with_gaps_joins() -> None:
    case = made_up(9, models=3, instructions=300, labels="soft")
    preferences, lengths, base = case["data"]
    gaps = preferences.copy()
    # It was judged where the baseline is easily beaten, which its mean preference does not know.
    gaps[2, case["gamma"] < 0] = np.nan
    whole = length_controlled_win_rate(preferences, lengths, base, difficulty=case["gamma"])
    result = length_controlled_win_rate(gaps, lengths, base, difficulty=case["gamma"])
    for m in (0, 1):
        assert result.win_rates[m] == whole.win_rates[m]
    assert values(result)[2] == pytest.approx(case["here"][2], abs=0.005)
    assert np.nanmean(gaps[2]) > case["here"][2] + 0.03
    fitted = length_controlled_win_rate(gaps, lengths, base)
    np.testing.assert_allclose(values(fitted), case["here"], atol=0.05)


def test_every_instruction_counts_the_same() -> None:
    preferences = np.array([[[1.0, 1.0, 1.0], [0.0, np.nan, np.nan]]])
    result = length_controlled_win_rate(preferences, np.ones((1, 2, 3)), np.ones(2))
    assert values(result)[0] == pytest.approx(0.5, abs=1e-9)


# --- degenerate cases -----------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", [1, 2, 50])
def test_the_baseline_against_itself(instructions: int) -> None:
    preferences, lengths, base = made_up(10, models=5, instructions=50)["data"]
    preferences, lengths = preferences.copy(), lengths.copy()
    preferences[3], lengths[3] = 0.5, base[:, None]
    kept = slice(0, instructions)
    result = length_controlled_win_rate(preferences[:, kept], lengths[:, kept], base[kept])
    assert result.win_rates[3].value == 0.5
    assert result.win_rates[3].low <= 0.5 <= result.win_rates[3].high
    assert result.length_effects[3] == 0


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("models", [1, 2, 6])
def test_a_model_that_wins_or_loses_everything(label: float, models: int) -> None:
    preferences, lengths, base = made_up(11, models, instructions=100)["data"]
    preferences = preferences.copy()
    preferences[0] = label
    result = length_controlled_win_rate(preferences, lengths, base)
    figure = result.win_rates[0]
    assert figure.value == pytest.approx(label, abs=0.01)
    assert 0 < figure.low < figure.value < figure.high < 1
    assert np.all(np.isfinite(result.length_effects))
    # It tells nothing of the judge's length effect, and does not spoil the others' figures.
    for m in range(1, models):
        alone = length_controlled_win_rate(preferences[1:], lengths[1:], base)
        assert values(result)[m] == pytest.approx(values(alone)[m - 1], abs=0.01)


def test_the_longer_answer_always_wins() -> None:
    _, lengths, base = made_up(12, models=1, instructions=200, pairs=1)["data"]
    preferences = (lengths > base[:, None]).astype(np.float64)
    (figure,) = length_controlled_win_rate(preferences, lengths, base).win_rates
    assert 0 < figure.low < 0.5 < figure.high < 1


def test_lengths_that_do_not_vary() -> None:
    preferences, lengths, base = made_up(13, models=2, instructions=60)["data"]
    gamma = np.zeros(60)
    for ours in (base[:, None] + np.zeros_like(lengths), base[:, None] + 0.1 + 0 * lengths):
        result = length_controlled_win_rate(preferences, ours, base, difficulty=gamma)
        np.testing.assert_allclose(values(result), preferences.mean(axis=(1, 2)), atol=1e-4)
        assert result.length_effects == (0.0, 0.0)


def test_an_extrapolation_says_so() -> None:
    rng = np.random.default_rng(0)
    preferences = (rng.random((1, 200)) < 0.3).astype(np.float64)
    lengths = rng.integers(5, 9, (1, 200))  # and the baseline's are all cut at 64
    (figure,) = length_controlled_win_rate(preferences, lengths, np.full(200, 64)).win_rates
    assert figure.high - figure.low > 0.9


def test_one_instruction_has_no_interval() -> None:
    result = length_controlled_win_rate([[0.7], [0.2]], [[30], [20]], [25])
    np.testing.assert_allclose(values(result), [0.7, 0.2], atol=0.002)
    assert [(figure.low, figure.high) for figure in result.win_rates] == [(0.0, 1.0)] * 2
    assert result.difficulty.tolist() == [0.0]


def test_difficulty_takes_three_models_that_vary() -> None:
    preferences, lengths, base = made_up(14, models=3)["data"]
    two = length_controlled_win_rate(preferences[:2], lengths[:2], base)
    assert not two.difficulty.any()
    ties = preferences.copy()
    ties[2] = 0.5
    assert not length_controlled_win_rate(ties, lengths, base).difficulty.any()
    three = length_controlled_win_rate(preferences, lengths, base).difficulty
    joined = [np.concatenate([ties[2:], preferences]), np.concatenate([lengths[2:], lengths])]
    np.testing.assert_allclose(
        length_controlled_win_rate(*joined, base).difficulty, three, atol=1e-9
    )
    assert three.mean() == pytest.approx(0, abs=1e-12)
    assert three.std() == pytest.approx(1)
    # Each of two models is what it is alone.
    alone = length_controlled_win_rate(preferences[:1], lengths[:1], base)
    assert values(two)[0] == pytest.approx(values(alone)[0], abs=1e-12)


# --- refusals -------------------------------------------------------------------------------------

GOOD = np.array([[0.2, 0.8, np.nan], [0.5, 1.0, 0.0]])
LONG = np.array([[10.0, 20.0, np.nan], [12.0, 18.0, 9.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": GOOD + 0.3}, r"\[0, 1\]"),
        ({"preferences": GOOD - 0.3}, r"\[0, 1\]"),
        ({"preferences": np.where(GOOD == 0.5, np.inf, GOOD)}, r"\[0, 1\]"),
        ({"preferences": GOOD[0]}, "shape"),
        ({"preferences": GOOD[:1]}, "shape"),
        ({"preferences": np.full_like(GOOD, np.nan)}, "judged pair"),
        ({"lengths": np.where(LONG == 20, np.nan, LONG)}, "lengths"),
        ({"lengths": np.where(LONG == 20, np.inf, LONG)}, "lengths"),
        ({"lengths": -LONG}, "lengths"),
        ({"baseline_lengths": [1, 2, np.nan]}, "lengths"),
        ({"baseline_lengths": [1, 2]}, "broadcast"),
        ({"difficulty": [0.0, 1.0]}, "difficulty"),
        ({"difficulty": [0.0, 1.0, np.nan]}, "difficulty"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"preferences": GOOD, "lengths": LONG, "baseline_lengths": [15, 15, 15]}
    length_controlled_win_rate(**good)
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(**(good | changes))
