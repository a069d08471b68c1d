"""Strategies that choose one of n whole draws, against exact enumeration and linear programs.

The base model of most tests has a handful of outcomes. The law of a strategy's answer is then a sum
over all n-tuples of draws, which is compared with closed forms that know nothing of tuples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import LinearConstraint, linprog, minimize

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.catalogue import describe_strategy, parse_strategy
from bonbon.decoding.distances import cosine_distances, distances, embed_texts
from bonbon.decoding.fitting import fit_beta
from bonbon.decoding.regularised import (
    RBoNKL,
    RBoNLength,
    RBoNWD,
    Regularised,
    SRBoNKL,
    SRBoNWD,
    base_logprobs,
    srbon_kl,
    srbon_wd,
)
from bonbon.decoding.soft import BestOfPoisson, SoftBestOfN, poisson_count, poisson_quantile
from bonbon.decoding.strategy import WholeDraws
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.cost import Candidates, Cost
from bonbon.sampling.random_streams import uniform_stream
from bonbon.system.errors import BonbonError
from bonbon.system.user_functions import import_function
from bonbon.tilt.best_of_poisson import BestOfPoisson as PoissonTilt
from bonbon.tilt.discrete import best_of_n_pmf, tilted_pmf
from support.groups import group_of
from support.models import build_tiny_model
from support.profiles import quick

Floats = NDArray[np.float64]


# --- a base model with few outcomes ---------------------------------------------------------------

TEXTS = ("a", "bb", "ccc", "")
P = np.array([0.4, 0.3, 0.2, 0.1])
R = np.array([1.0, 2.0, 2.0, -1.0])  # "bb" and "ccc" tie
POINTS = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [0.0, 0.0]])
REWARD = dict(zip(TEXTS, R.tolist(), strict=True))


def group_of_draws(draws: Sequence[int], prompt_id: str = "p") -> Group:
    return group_of(
        prompt_id,
        completions=[TEXTS[k] for k in draws],
        token_ids=tuple((k,) * (len(TEXTS[k]) + 1) for k in draws),
        logprobs=tuple(math.log(P[k]) for k in draws),
    )


class FiniteSource:
    """Independent draws from the outcomes, by the inverse CDF."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.config = SamplingConfig(n=n, seed=seed)

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        return [self._draw(prompt.prompt_id, k) for prompt, k in zip(prompts, ks, strict=True)]

    def _draw(self, prompt_id: str, ks: range) -> Candidates:
        uniforms = [uniform_stream(self.config.seed, "finite", prompt_id, k, 1)[0] for k in ks]
        draws = np.minimum(np.searchsorted(np.cumsum(P), uniforms, side="right"), len(P) - 1)
        group = group_of_draws(draws.tolist(), prompt_id)
        return Candidates(group, Cost(generated=sum(group.lengths()), prefilled=3))

    def embed(self, group: Group) -> Floats:
        return POINTS[[TEXTS.index(text) for text in group.completions]]


def by_text(prompts: Sequence[Any], completions: Sequence[str]) -> Floats:
    return np.array([REWARD[text] for text in completions])


def prompts_of(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"p{i}", "Once", (1, 2, 3)) for i in range(count)]


def enumerated(strategy: WholeDraws, n: int) -> Floats:
    """The law of the answer to n draws, (outcomes,): all n-tuples, each with its probability."""
    law, source = np.zeros(len(P)), FiniteSource(n)
    for draws in product(range(len(P)), repeat=n):
        index = list(draws)
        group = group_of_draws(index).with_rewards(R[index])
        weights = strategy.weights(group, source)
        assert weights.shape == (n,)
        assert np.all(weights >= 0)
        np.add.at(law, index, P[index].prod() * weights)
    return law


# --- laws, exactly --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_law_of_best_of_n(n: int) -> None:
    np.testing.assert_allclose(enumerated(BestOfN(), n), best_of_n_pmf(P, R, n), atol=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_law_of_best_of_poisson(mu: float) -> None:
    """The mixture over counts of enumerated laws is the tilt; 1e-6 is left of the counts."""
    counts = np.arange(1, 6 if mu else 2)
    mixing = stats.poisson.pmf(counts - 1, mu)
    law = sum(
        share * enumerated(BestOfPoisson(), int(n)) for share, n in zip(mixing, counts, strict=True)
    )
    tilted = tilted_pmf(P, R, PoissonTilt(mu))
    np.testing.assert_allclose(law, tilted, atol=1 - mixing.sum() + 1e-14)
    assert 1 - mixing.sum() < 1e-4


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_law_of_soft_best_of_n(n: int, tau: float) -> None:
    """By counts instead of tuples: multinomial(counts) · count·e^(r/τ) / Σ count·e^(r/τ)."""
    expected = np.zeros(len(P))
    for counts in product(range(n + 1), repeat=len(P)):
        if sum(counts) == n:
            mass = np.array(counts) * np.exp(R / tau)
            expected += stats.multinomial.pmf(counts, n, P) * mass / mass.sum()
    np.testing.assert_allclose(enumerated(SoftBestOfN(tau=tau), n), expected, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_soft_best_of_n_between_its_limits(n: int) -> None:
    # Of ties best-of-n takes the first and the softmax any: one law, as draws are exchangeable.
    np.testing.assert_allclose(
        enumerated(SoftBestOfN(tau=1e-300), n), best_of_n_pmf(P, R, n), atol=1e-12
    )
    np.testing.assert_allclose(enumerated(SoftBestOfN(tau=1e300), n), P, atol=1e-12)


def test_soft_best_of_n_tends_to_the_tilted_law() -> None:
    """To π0 e^(r/τ)/Z with a KL in O(1/n) (Verdun et al.); two outcomes, so a binomial sum."""
    p, odds, kls = 0.3, math.exp(1 / 0.7), []
    limit = p * odds / (p * odds + 1 - p)
    for n in (50, 100, 200, 400):
        good = np.arange(n + 1)
        chosen = np.array(
            [
                SoftBestOfN(tau=0.7)
                .weights(_scored([1.0] * k + [0.0] * (n - k)), FiniteSource(n))[:k]
                .sum()
                for k in good
            ]
        )
        q = float(stats.binom.pmf(good, n, p) @ chosen)
        kls.append(limit * math.log(limit / q) + (1 - limit) * math.log((1 - limit) / (1 - q)))
    assert 0 < kls[-1] < 1e-4
    assert all(later < earlier / 1.9 for earlier, later in pairwise(kls))


def _scored(rewards: Sequence[float], **changes: Any) -> Group:
    texts = [f"text {k}" for k in range(len(rewards))]
    return group_of(completions=texts, rewards=tuple(map(float, rewards)), **changes)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_law_of_srbon_kl(n: int, beta: float) -> None:
    """π0 e^(r/β) on the set of what was drawn, by sets instead of tuples."""
    expected = np.zeros(len(P))
    tilted = P * np.exp(R / beta)
    for draws in product(range(len(P)), repeat=n):
        drawn = sorted(set(draws))
        expected[drawn] += P[list(draws)].prod() * tilted[drawn] / tilted[drawn].sum()
    np.testing.assert_allclose(enumerated(SRBoNKL(beta=beta), n), expected, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_laws_of_regularised_choices(n: int) -> None:
    """Against plain loops over tuples, in which only the text decides and never the place."""
    unit = [[1, 0], [2**-0.5, 2**-0.5], [-(5**-0.5), 2 * 5**-0.5], [0, 0]]
    apart = [[1 - a[0] * b[0] - a[1] * b[1] for b in unit] for a in unit]
    apart = [[0.0 if a == b else apart[a][b] for b in range(4)] for a in range(4)]
    score: dict[WholeDraws, Callable[[int, tuple[int, ...]], float]] = {
        RBoNKL(beta=1.7): lambda y, drawn: R[y] + 1.7 * math.log(P[y]),
        RBoNLength(beta=4.1): lambda y, drawn: R[y] - 4.1 / (len(TEXTS[y]) + 1),
        RBoNWD(beta=3.3): lambda y, drawn: R[y] - 3.3 * sum(apart[y][z] for z in drawn) / n,
    }
    for strategy, value in score.items():
        expected = np.zeros(len(P))
        for draws in product(range(len(P)), repeat=n):
            best = max(round(value(y, draws), 9) for y in draws)
            first = next(y for y in draws if round(value(y, draws), 9) == best)
            expected[first] += P[list(draws)].prod()
        np.testing.assert_allclose(enumerated(strategy, n), expected, atol=1e-14)
        # Of two candidates each is as far from the other, so there RBoN-WD is best-of-n.
        matters = np.abs(expected - best_of_n_pmf(P, R, n)).max() > 0.01
        assert matters == (n > 2 or not isinstance(strategy, RBoNWD))


# --- drawing --------------------------------------------------------------------------------------

ALL = [
    BestOfPoisson(),
    SoftBestOfN(tau=0.8),
    RBoNKL(beta=0.5),
    RBoNLength(beta=2.0),
    RBoNWD(),
    SRBoNKL(beta=0.6),
    SRBoNWD(beta=0.6),
]
every = pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)


@every
def test_answers_follow_the_law(strategy: WholeDraws) -> None:
    """End to end over 1,500 prompts; the same answers again; costs of all that was drawn."""
    prompts, source = prompts_of(1_500), FiniteSource(3)
    answers = strategy.generate(prompts, source, by_text)
    counts = np.array([sum(a.completion == text for a in answers) for text in TEXTS])
    poisson = isinstance(strategy, BestOfPoisson)
    law = tilted_pmf(P, R, PoissonTilt(2.0)) if poisson else enumerated(strategy, 3)
    possible = law > 1e-12
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], law[possible] / law.sum() * 1_500).pvalue > 1e-4
    drawn = [poisson_count(2, 0, p.prompt_id) if poisson else 3 for p in prompts]
    assert [a.cost.reward_calls for a in answers] == [a.group.n for a in answers] == drawn
    assert all(a.reward == REWARD[a.completion] for a in answers)
    again = strategy.generate(prompts[50:60], source, by_text)
    assert [a.chosen for a in again] == [a.chosen for a in answers[50:60]]


@every
def test_one_candidate_is_chosen(strategy: WholeDraws) -> None:
    group = group_of_draws([1]).with_rewards([2.0])
    np.testing.assert_array_equal(strategy.weights(group, FiniteSource(1)), [1.0])


@every
def test_settings_round_trip(strategy: WholeDraws) -> None:
    assert parse_strategy(describe_strategy(strategy)) == strategy


@quick
@given(st.floats(0, 300), st.floats(0, 1, exclude_max=True))
def test_poisson_quantile(mu: float, p: float) -> None:
    count = poisson_quantile(p, mu)
    assert count == max(stats.poisson.ppf(p, mu), 0)  # SciPy's quantile of 0 is −1
    assert stats.poisson.cdf(count, mu) >= p
    assert count == 0 or stats.poisson.cdf(count - 1, mu) < p


@pytest.mark.parametrize("mu", [0.3, 1.0, 7.0, 63.0])
def test_poisson_quantile_at_the_steps(mu: float) -> None:
    counts = np.arange(int(mu + 6 * math.sqrt(mu)))
    steps = stats.poisson.cdf(counts, mu)
    assert [poisson_quantile(float(p), mu) for p in steps] == counts.tolist()
    past = steps + 1e-3 * stats.poisson.pmf(counts + 1, mu)
    assert [poisson_quantile(float(p), mu) for p in past] == (counts + 1).tolist()


def test_poisson_counts_differ_by_prompt_and_seed_only() -> None:
    counts = np.array([poisson_count(7, 0, f"p{i}") for i in range(2_000)])
    assert counts.mean() == pytest.approx(8, abs=5 * math.sqrt(7 / 2_000))
    assert counts.var() == pytest.approx(7, rel=0.15)
    np.testing.assert_array_equal(counts[:50], [poisson_count(7, 0, f"p{i}") for i in range(50)])
    assert any(counts[i] != poisson_count(7, 1, f"p{i}") for i in range(50))
    assert {poisson_count(0, 0, f"p{i}") for i in range(50)} == {1}


# --- β = 0, β → 0, β → ∞ --------------------------------------------------------------------------

tuples = st.lists(st.integers(0, 3), min_size=1, max_size=6)
spread = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@quick
@given(tuples, st.data())
def test_no_regularisation_is_best_of_n(draws: list[int], data: st.DataObject) -> None:
    """The same index, ties included, whatever the rewards."""
    levels = st.sampled_from([-1.0, 0.0, 0.1, 1e9])
    rewards = data.draw(st.lists(levels, min_size=len(draws), max_size=len(draws)))
    group, source = group_of_draws(draws).with_rewards(rewards), FiniteSource(len(draws))
    best = int(np.argmax(BestOfN().weights(group, source)))
    for kind in (RBoNKL, RBoNWD, RBoNLength, SRBoNWD):
        weights = kind(beta=0).weights(group, source)
        assert int(np.argmax(weights)) == best
        assert weights[best] == pytest.approx(1, abs=1e-12)


@quick
@given(tuples)
def test_limits_of_srbon(draws: list[int]) -> None:
    group, source = group_of_draws(draws).with_rewards(R[draws]), FiniteSource(len(draws))
    outcome = np.array(draws)
    base = np.array([P[k] / draws.count(k) for k in draws])
    best = base * (R[draws] == R[draws].max())
    for kind in (SRBoNKL, SRBoNWD):
        np.testing.assert_allclose(
            _by_outcome(kind(beta=1e12).weights(group, source), outcome),
            _by_outcome(base / base.sum(), outcome),
            atol=1e-9,
        )
    np.testing.assert_allclose(
        SRBoNKL(beta=1e-300).weights(group, source), best / best.sum(), atol=1e-12
    )
    weights = SRBoNWD(beta=1e-9).weights(group, source)
    assert weights @ R[draws] == pytest.approx(R[draws].max())


def _by_outcome(weights: Floats, outcome: NDArray[np.intp]) -> Floats:
    return np.bincount(outcome, weights=weights, minlength=len(P))


# --- the stochastic forms are maxima --------------------------------------------------------------


@quick
@given(st.data())
def test_srbon_wd_is_the_linear_program(data: st.DataObject) -> None:
    """max_q q·r − β·W1(q, base) over all q and plans at once, by HiGHS."""
    n = data.draw(st.integers(1, 5), label="n")
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6), label="seed"))
    beta = data.draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]), label="beta")
    rewards, apart = rng.normal(size=n), rng.random((n, n))  # distances without symmetry
    base = rng.dirichlet(np.ones(n))
    q = srbon_wd(rewards, apart, base, beta)
    assert q.sum() == pytest.approx(1)
    # Variables: q, then the plan row by row, whose row sums are q and column sums base.
    rows = np.hstack([-np.eye(n), np.kron(np.eye(n), np.ones(n))])
    columns = np.hstack([np.zeros((n, n)), np.kron(np.ones(n), np.eye(n))])
    program = linprog(
        np.concatenate([-rewards, beta * apart.ravel()]),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.zeros(n), base]),
    )
    assert program.status == 0
    transported = linprog(
        apart.ravel(),
        A_eq=np.vstack([rows[:, n:], columns[:, n:]]),
        b_eq=np.concatenate([q, base]),
    )
    assert q @ rewards - beta * transported.fun == pytest.approx(-program.fun, abs=1e-8)
    np.testing.assert_allclose(q, program.x[:n], atol=1e-7)  # the maximiser is unique here


@quick
@given(st.data())
def test_srbon_kl_is_the_maximum(data: st.DataObject) -> None:
    """E_q r − β·KL(q ‖ base) at it is β·ln Σ base·e^(r/β), and less at any other distribution."""
    n = data.draw(st.integers(2, 5), label="n")
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6), label="seed"))
    beta = data.draw(st.floats(0.05, 20), label="beta")
    rewards, base = rng.normal(size=n), rng.dirichlet(np.ones(n))

    def objective(q: Floats) -> float:
        some = q > 0
        return float(q @ rewards - beta * q[some] @ np.log(q[some] / base[some]))

    best = srbon_kl(rewards, np.log(base) - 40.0, beta)  # up to a constant
    value = objective(best)
    assert value == pytest.approx(beta * math.log(base @ np.exp(rewards / beta)), abs=1e-9)
    assert all(objective(rng.dirichlet(np.ones(n))) <= value + 1e-12 for _ in range(20))


def test_srbon_kl_by_a_solver() -> None:
    rewards, base, beta = np.array([0.3, 1.0, -0.5]), np.array([0.5, 0.2, 0.3]), 0.7
    found = minimize(
        lambda q: float(-q @ rewards + beta * q @ np.log(q / base)),
        np.full(3, 1 / 3),
        method="SLSQP",
        bounds=[(1e-9, 1)] * 3,
        constraints=LinearConstraint(np.ones((1, 3)), 1, 1),
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(srbon_kl(rewards, np.log(base), beta), found.x, atol=1e-6)


# --- copies and ties ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SRBoNKL, SRBoNWD])
def test_copies_are_one_outcome(kind: type[Regularised]) -> None:
    source = FiniteSource(4)
    once = group_of_draws([0, 1, 2]).with_rewards(R[[0, 1, 2]])
    twice = group_of_draws([0, 0, 1, 2]).with_rewards(R[[0, 0, 1, 2]])
    single = kind(beta=0.9).weights(once, source)
    copied = kind(beta=0.9).weights(twice, source)
    np.testing.assert_allclose([copied[0] + copied[1], *copied[2:]], single, atol=1e-14)


def test_two_tokenisations_of_a_text_are_two_outcomes() -> None:
    group = group_of(
        completions=["ab", "ab", "ab", "c"],
        token_ids=((1,), (1,), (2, 3), (4,)),
        logprobs=tuple(math.log(p) for p in (0.2, 0.2, 0.3, 0.1)),
    )
    np.testing.assert_allclose(np.exp(base_logprobs(group)), [0.1, 0.1, 0.3, 0.1])


def test_a_copy_counts_as_a_draw_where_the_candidates_are_a_sample() -> None:
    group, source = group_of_draws([0, 0, 1]).with_rewards([0.0, 0.0, 0.0]), FiniteSource(3)
    np.testing.assert_allclose(SoftBestOfN().weights(group, source), [1 / 3] * 3)
    # "a" is drawn twice and "bb" once, so "a" has the smaller mean distance.
    np.testing.assert_array_equal(RBoNWD().weights(group, source), [1, 0, 0])
    spread = distances("embedding", None, group, source).mean(axis=1)
    assert spread[0] < spread[2]


def test_ties_go_to_the_first() -> None:
    group = _scored([1.0, 1.0, 1.0], logprobs=(-1.0, -1.0, -1.0), token_ids=((1,), (2,), (3,)))
    for strategy in (RBoNKL(beta=1), RBoNLength(beta=1)):
        np.testing.assert_array_equal(strategy.weights(group, FiniteSource(3)), [1, 0, 0])
    together = srbon_wd(np.ones(3), np.zeros((3, 3)), np.array([0.2, 0.3, 0.5]), 1.0)
    np.testing.assert_array_equal(together, [1, 0, 0])


def test_a_candidate_of_no_tokens_counts_as_one() -> None:
    group = _scored([0.0, 0.0, 0.4], token_ids=((), (5,), (5, 6)), logprobs=(0.0, -1.0, -2.0))
    np.testing.assert_allclose(RBoNLength().known(group, None), [1, 1, 0.5])
    np.testing.assert_array_equal(RBoNLength().weights(group, FiniteSource(3)), [0, 0, 1])


def test_length_penalises_the_short() -> None:
    """The sign as in the authors' code: −β/|y|."""
    group = _scored([1.0, 0.9], token_ids=((1,), (1,) * 10), logprobs=(-1.0, -10.0))
    assert RBoNLength(beta=0.1).weights(group, FiniteSource(2))[0] == 1
    assert RBoNLength(beta=0.2).weights(group, FiniteSource(2))[1] == 1


@pytest.mark.parametrize("kind", [RBoNKL, SRBoNKL, SRBoNWD])
@pytest.mark.parametrize("missing", [math.nan, -math.inf])
def test_missing_log_probabilities(kind: type[Regularised], missing: float) -> None:
    assert kind.needs_logprobs
    group = group_of("q7", logprobs=(-1.0, missing, -2.0), rewards=(0.0, 1.0, 2.0))
    source = FiniteSource(3)
    source.embed = lambda group: np.eye(3)
    with pytest.raises(BonbonError, match="prompt q7, completion 2 of 3 came without a log-prob"):
        kind(beta=1).weights(group, source)
    for free in (RBoNWD(), RBoNLength(), SoftBestOfN()):
        assert not free.needs_logprobs
        assert free.weights(group, source).sum() == pytest.approx(1)


@quick
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6), st.floats(5e-324, 1e300))
def test_softmaxes_of_extremes(rewards: list[float], tau: float) -> None:
    for weights in (
        SoftBestOfN(tau=tau).weights(_scored(rewards), FiniteSource(1)),
        srbon_kl(np.array(rewards), np.full(len(rewards), -700.0), tau),
    ):
        assert np.all(np.isfinite(weights))
        assert weights.sum() == pytest.approx(1)
        assert weights[int(np.argmax(rewards))] == weights.max()


def test_softmax_of_nothing() -> None:
    log_base = np.array([0.0, -math.inf, math.log(3)])
    np.testing.assert_allclose(srbon_kl(np.zeros(3), log_base, 1.0), [0.25, 0, 0.75])


# --- distances ------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_cosine_distances(data: st.DataObject) -> None:
    from scipy.spatial.distance import cdist

    n, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    x = np.random.default_rng(data.draw(st.integers(0, 10**6))).normal(size=(n, width))
    apart = cosine_distances(x * 10.0 ** data.draw(st.integers(-9, 9)))
    np.testing.assert_allclose(apart, cdist(x, x, "cosine"), atol=1e-12)
    assert np.all((apart >= 0) & (apart <= 2))
    np.testing.assert_array_equal(np.diag(apart), np.zeros(n))
    np.testing.assert_allclose(apart, apart.T, atol=1e-15)


def test_vectors_of_zeros() -> None:
    apart = cosine_distances([[0, 0], [3, 4], [0, 0], [-3, -4]])
    expected = [[0, 1, 0, 1], [1, 0, 1, 2], [0, 1, 0, 1], [1, 2, 1, 0]]
    np.testing.assert_allclose(apart, expected, atol=1e-15)


FUNCTIONS = """
import numpy as np

calls = []

def by_length(texts):
    calls.append(list(texts))
    return [[max(len(a) - len(b), 0) for b in texts] for a in texts]

def zeros_and(value):
    def distance(texts):
        apart = np.zeros((len(texts), len(texts)))
        apart[0, 1] = value
        return apart
    return distance

nan, infinite, negative = zeros_and(np.nan), zeros_and(np.inf), zeros_and(-0.5)
flat = lambda texts: np.zeros(len(texts))
number = 3

def fails(texts):
    raise RuntimeError("no such metric")
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of distance functions that can be imported; its name."""
    (tmp_path / "own_distances.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_distances", raising=False)
    return "own_distances"


def test_a_function_of_the_user_s(functions: str) -> None:
    """d[i, j] is the distance of i from j, not the other way round."""
    group = group_of_draws([0, 2, 1]).with_rewards([0.0, 2.5, 0.0])
    source = FiniteSource(3)
    strategy = RBoNWD(beta=3, distance=f"{functions}:by_length")
    np.testing.assert_allclose(strategy.known(group, None), [0, 1, 1 / 3])
    np.testing.assert_array_equal(strategy.weights(group, source), [1, 0, 0])
    wide = SRBoNWD(beta=3, distance=f"{functions}:by_length").weights(group, source)
    # "ccc" is farther from the others than its reward is worth, so all mass but its own stays away:
    # from "a" (2 away) to "a", from "bb" (1 away) to the first of "a" and "bb", both at 0.
    np.testing.assert_allclose(wide, np.array([0.7, 0.2, 0]) / 0.9)
    calls = import_function(f"{functions}:by_length", "x").__globals__["calls"]
    assert calls[0] == ["a", "ccc", "bb"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "from completion 1 to completion 2 of prompt p it is nan"),
        ("infinite", "it is inf"),
        ("negative", "it is -0.5; a distance is finite and at least 0"),
        ("flat", r"shape is \(3,\) for 3 completions; it must be \(3, 3\)"),
        ("fails", "failed: RuntimeError: no such metric"),
        ("number", "is not a function"),
        ("lenght", "cannot be imported: AttributeError"),
    ],
)
def test_functions_that_are_no_distances(functions: str, name: str, said: str) -> None:
    group = group_of_draws([0, 1, 2]).with_rewards([0.0, 1.0, 2.0])
    with pytest.raises(BonbonError, match=f"distance function '{functions}:{name}'.*{said}"):
        RBoNWD(distance=f"{functions}:{name}").weights(group, FiniteSource(3))


def test_distances_that_cannot_be_had_are_said_before_anything_is_drawn() -> None:
    source = FiniteSource(2)
    source.draw = lambda prompts, ks: pytest.fail("drawn")
    with pytest.raises(BonbonError, match="no_such_module"):
        RBoNWD(distance="no_such_module:f").generate(prompts_of(1), source, by_text)
    with pytest.raises(BonbonError, match="embedding model /no/such: there is no such folder"):
        RBoNWD(embedding="/no/such").generate(prompts_of(1), source, by_text)


def test_embeddings_that_are_not_numbers() -> None:
    source = FiniteSource(2)
    source.embed = lambda group: np.array([[1.0, math.nan], [1.0, 0.0]])
    with pytest.raises(BonbonError, match="distance of embeddings: from completion 1"):
        RBoNWD().weights(group_of_draws([0, 1]).with_rewards([0.0, 1.0]), source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distance": "cosine"}, "distance is `embedding` or package.module:function"),
        ({"distance": "m:f", "embedding": "m"}, "a distance function does not use `embedding`"),
        ({"beta": -1}, "greater than or equal to 0"),
        ({"beta": math.nan}, "finite"),
    ],
)
@pytest.mark.parametrize("name", ["rbon_wd", "srbon_wd"])
def test_settings_that_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_strategy({"name": name, **changes})


@pytest.mark.parametrize(
    "settings", [{"name": "soft_best_of_n", "tau": 0}, {"name": "srbon_kl", "beta": 0}]
)
def test_temperatures_are_above_zero(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        parse_strategy(settings)


@pytest.mark.parametrize("name", ["", "module", "module:", ":function"])
def test_names_of_functions(name: str) -> None:
    with pytest.raises(BonbonError, match=f"extractor '{name}': write it as package.module:func"):
        import_function(name, "extractor")


# --- a model that embeds --------------------------------------------------------------------------


def test_embed_texts(tiny_model: Path) -> None:
    """The mean over a text's own tokens, alone or in a batch; too long ones are cut at the end."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["a cat", "", "a much longer text", "x" * 200, "a cat"]
    embedded = embed_texts(str(tiny_model), texts)
    model = AutoModel.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row, text in zip(embedded, texts, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.inference_mode():
            alone = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)
    np.testing.assert_array_equal(embedded[0], embedded[4])


def test_embedding_by_a_model(tiny_model: Path) -> None:
    group = group_of_draws([0, 2, 1, 0]).with_rewards([0.0, 0.1, 0.0, 0.0])
    strategy = RBoNWD(beta=2, embedding=str(tiny_model))
    expected = cosine_distances(embed_texts(str(tiny_model), group.completions)).mean(axis=1)
    np.testing.assert_allclose(strategy.known(group, None), expected, atol=1e-12)
    best = int(np.argmax(np.array(group.rewards) - 2 * expected))
    assert int(np.argmax(strategy.weights(group, FiniteSource(4)))) == best


def test_texts_without_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = build_tiny_model(tmp_path / "bare")
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.Sequence([])  # no <s> in front
    tokenizer.save(path)
    embedded = embed_texts(str(folder), ["", "a", ""])
    np.testing.assert_array_equal(embedded[[0, 2]], np.zeros((2, 16)))
    assert np.abs(embedded[1]).max() > 0
    np.testing.assert_array_equal(embed_texts(str(folder), [""]), np.zeros((1, 16)))


# --- fitting β ------------------------------------------------------------------------------------


def hacked_groups(prompts: int = 12, n: int = 6) -> list[Group]:
    """A reward whose best candidates are unlikely ones with a poor gold value."""
    rng, groups = np.random.default_rng(5), []
    for i in range(prompts):
        logprobs = -rng.exponential(5.0, n) - 1
        truth = rng.normal(size=n)
        rewards = truth - 0.6 * logprobs
        group = _scored(rewards.tolist(), logprobs=tuple(logprobs.tolist()), prompt_id=f"p{i}")
        groups.append(group.with_metric("gold", truth))
    return groups


def test_fit_finds_the_beta_that_undoes_the_bias() -> None:
    """gold = r − 0.6·(−ln π0), so β = 0.6 takes the best of the gold values in every group."""
    groups = hacked_groups()
    betas = [0.0, 0.1, 0.3, 0.6, 1.2, 5.0]
    fitted = fit_beta(RBoNKL(), groups, "gold", betas)
    assert fitted.beta == 0.6
    assert not fitted.at_edge
    assert [point.beta for point in fitted.curve] == betas
    oracle = np.mean([max(group.metrics["gold"]) for group in groups])
    assert fitted.curve[3].gold.value == pytest.approx(oracle)
    for point in fitted.curve:
        tried = RBoNKL(beta=point.beta)
        by_hand = [tried.weights(g, FiniteSource(6)) @ g.metrics["gold"] for g in groups]
        assert point.gold.value == pytest.approx(np.mean(by_hand))
        assert point.gold.low < point.gold.value < point.gold.high


def test_fitted_on_the_default_grid() -> None:
    fitted = fit_beta(RBoNKL(), hacked_groups(), "gold")
    assert len(fitted.curve) == 27
    assert fitted.curve[0].beta == 0
    assert fitted.beta == pytest.approx(0.6, rel=0.6)
    assert not fitted.at_edge
    scaled = [g.with_rewards(1e3 * np.array(g.rewards)) for g in hacked_groups()]
    again = fit_beta(RBoNKL(), scaled, "gold")
    assert again.beta == pytest.approx(1e3 * fitted.beta)  # the grid goes with the reward's scale


@pytest.mark.parametrize(
    ("strategy", "field", "zero"),
    [
        (SoftBestOfN(), "tau", False),
        (RBoNLength(), "beta", True),
        (RBoNWD(), "beta", True),
        (SRBoNKL(), "beta", False),
        (SRBoNWD(), "beta", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, WholeDraws) else None,
)
def test_fit_of_every_strategy(strategy: WholeDraws, field: str, zero: bool) -> None:
    rng, source = np.random.default_rng(1), FiniteSource(4)
    groups = []
    for i in range(5):
        draws = rng.integers(0, 4, 4).tolist()
        group = group_of_draws(draws, f"p{i}").with_rewards(R[draws] + rng.normal(size=4))
        groups.append(group.with_metric("gold", rng.normal(size=4)))
    fitted = fit_beta(strategy, groups, "gold", source=source, field=field)
    assert (fitted.curve[0].beta == 0) == zero
    for point in fitted.curve[:: len(fitted.curve) // 3]:
        tried = type(strategy).model_validate({field: point.beta})
        by_hand = [tried.weights(g, source) @ g.metrics["gold"] for g in groups]
        assert point.gold.value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert fitted.beta == max(fitted.curve, key=lambda point: point.gold.value).beta


def test_other_settings_are_kept(functions: str) -> None:
    name = f"{functions}:by_length"
    groups = [group_of_draws([0, 2]).with_rewards([0.0, 1.0]).with_metric("gold", [1.0, 0.0])]
    fitted = fit_beta(RBoNWD(distance=name), groups, "gold", [0.5, 1.5, 2.5])
    assert [point.gold.value for point in fitted.curve] == [0.0, 1.0, 1.0]
    assert fitted.beta == 1.5  # of tied ones the smallest
    assert not fitted.at_edge


@pytest.mark.parametrize(
    ("gold", "betas", "best", "at_edge"),
    [
        ([0.0, 1.0], [0.0, 1.0, 9.0], 0.0, False),  # nothing lies below 0
        ([0.0, 1.0], [0.1, 1.0, 9.0], 0.1, True),
        ([1.0, 0.0], [0.0, 1.0, 9.0], 9.0, True),
        ([1.0, 0.0], [9.0, 0.0, 9.0, 70.0], 9.0, False),
        ([1.0, 1.0], [3.0, 2.0, 4.0], 2.0, True),
    ],
)
def test_edges_of_the_grid(
    gold: list[float], betas: list[float], best: float, at_edge: bool
) -> None:
    group = _scored([0.0, 2.0], logprobs=(-1.0, -2.0)).with_metric("gold", gold)
    fitted = fit_beta(RBoNKL(), [group], "gold", betas)
    assert (fitted.beta, fitted.at_edge) == (best, at_edge)


def test_groups_in_which_nothing_varies() -> None:
    group = _scored([1.0, 1.0], logprobs=(-1.0, -1.0)).with_metric("gold", [0.0, 1.0])
    fitted = fit_beta(RBoNKL(), [group], "gold")
    assert [fitted.curve[1].beta, fitted.curve[-1].beta] == pytest.approx([1e-4, 10])
    assert fitted.beta == 0


def test_fits_that_are_refused() -> None:
    scored = _scored([0.0, 1.0]).with_metric("gold", [0.0, math.nan])
    with pytest.raises(BonbonError, match="no metric 'truth' \\(it has gold\\)"):
        fit_beta(RBoNKL(), [scored], "truth")
    with pytest.raises(BonbonError, match="completion 2: the metric 'gold' is nan"):
        fit_beta(RBoNKL(), [scored], "gold")
    with pytest.raises(BonbonError, match="has no rewards"):
        fit_beta(RBoNKL(), [group_of()], "gold")
    with pytest.raises(BonbonError, match="no groups to fit on"):
        fit_beta(RBoNKL(), [], "gold")
    good = scored.with_metric("gold", [0.0, 1.0])
    with pytest.raises(BonbonError, match="need a source that embeds"):
        fit_beta(RBoNWD(), [good], "gold")
    with pytest.raises(ValueError, match="SoftBestOfN has no setting 'beta'"):
        fit_beta(SoftBestOfN(), [good], "gold")
    with pytest.raises(ValueError, match="betas is empty"):
        fit_beta(RBoNKL(), [good], "gold", [])
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        fit_beta(RBoNKL(), [good], "gold", [-1.0])
