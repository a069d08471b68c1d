"""Speculative rejection, TreeBoN and SMC against exact enumeration, best-of-n and genlm-control."""

from __future__ import annotations

import asyncio
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.catalogue import describe_strategy, parse_strategy
from bonbon.decoding.partial import token_log_ratios, weighted_implicit_reward
from bonbon.decoding.smc import (
    SMC,
    effective_sample_size,
    log_mean_exp,
    log_normaliser,
    systematic_ancestors,
)
from bonbon.decoding.soft import SoftBestOfN
from bonbon.decoding.source import LocalSource
from bonbon.decoding.speculative_rejection import SpeculativeRejection, survivors
from bonbon.decoding.stepwise import Stepwise
from bonbon.decoding.strategy import Floats, Generation, Strategy
from bonbon.decoding.tree import TreeBoN, next_layer
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.models.loading import load_policy
from bonbon.sampling.completion_text import completion_text
from bonbon.sampling.cost import Candidates, Cost
from bonbon.sampling.random_streams import uniform_stream
from bonbon.system.errors import BonbonError
from support.models import EOS, byte_tokenizer, tiny_llama_config

# --- a language of three letters ------------------------------------------------------------------
#
# Tokens 0, 1, 2 are letters and 3 ends; at most three tokens, so there are 40 completions.

LETTERS, END, LONGEST = "abc", 3, 3
Ids = tuple[int, ...]
PROMPT_IDS = (7, 8)


@cache
def following(ids: Ids) -> Floats:
    """The next token's probabilities, made up once for every prefix."""
    return np.random.default_rng([5, *ids]).dirichlet(np.ones(4))


@cache
def following_cdf(ids: Ids) -> list[float]:
    return list(np.cumsum(following(ids)))


@cache
def uniforms_of(seed: int, prompt_id: str, k: int) -> list[float]:
    return list(uniform_stream(seed, "", prompt_id, k, LONGEST))


def ended(ids: Ids) -> bool:
    return len(ids) == LONGEST or ids[-1:] == (END,)


def text_of(ids: Ids) -> str:
    return "".join(LETTERS[token] for token in ids if token != END)


@cache
def reward_of(text: str) -> float:
    return float(np.random.default_rng([11, *map(ord, text)]).normal())


def letter_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    return np.array([reward_of(text) for text in completions])


@cache
def completions_of(prefix: Ids = ()) -> Mapping[Ids, float]:
    """Every whole completion that begins with `prefix`, and its probability given that."""
    if ended(prefix):
        return {prefix: 1.0}
    return {
        ids: p * rest
        for token, p in enumerate(following(prefix))
        for ids, rest in completions_of((*prefix, token)).items()
    }


class LetterRows:
    """`Rows` of the three-letter language: the same contract, without a model."""

    def __init__(self, config: SamplingConfig, prompt: EncodedPrompt, n: int) -> None:
        self.config, self.prompt, self.next_k = config, prompt, n
        self.rows: list[Ids] = [()] * n
        self.streams = [self._stream(k) for k in range(n)]
        self.prefilled, self.generated, self.peak = len(prompt.token_ids), 0, 0

    def _stream(self, k: int) -> list[float]:
        return uniforms_of(self.config.seed, self.prompt.prompt_id, k)

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def finished(self) -> list[bool]:
        return [ended(ids) for ids in self.rows]

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.rows]

    def cache_tokens(self) -> int:
        columns = len(self.prompt.token_ids) + max(self.lengths())
        return columns * self.finished.count(False)

    def draw(self, tokens: int) -> int:
        before, live = self.generated, self.finished.count(False)
        for _ in range(tokens):
            for row, ids in enumerate(self.rows):
                if not ended(ids):
                    cdf, uniform = following_cdf(ids), self.streams[row][len(ids)]
                    self.rows[row] = (*ids, bisect_right(cdf, uniform * cdf[-1]))
                    self.generated += 1
        self.peak = max(self.peak, live * (len(self.prompt.token_ids) + max(self.lengths())))
        return self.generated - before

    def free_finished(self) -> None:
        """Nothing to free: finished rows hold no cache here."""

    def select(self, rows: Sequence[int]) -> None:
        seen: set[int] = set()
        streams = []
        for row in rows:
            if row in seen:
                streams.append(self._stream(self.next_k))
                self.next_k += 1
            else:
                streams.append(self.streams[row])
            seen.add(row)
        self.rows, self.streams = [self.rows[row] for row in rows], streams

    def group(self) -> Group:
        reasons = ["stop" if ids[-1:] == (END,) else "length" for ids in self.rows]
        return Group(
            self.prompt.prompt_id,
            self.prompt.prompt,
            self.prompt.token_ids,
            tuple(text_of(ids) for ids in self.rows),
            tuple(self.rows),
            (math.nan,) * self.n,
            tuple(reasons),
        )


class LetterSource:
    """A stepwise source of the three-letter language; it remembers the rows that it started."""

    def __init__(self, **changes: Any) -> None:
        self.config = SamplingConfig(max_new_tokens=LONGEST, **changes)
        self.started: list[LetterRows] = []

    def start(self, prompt: EncodedPrompt, n: int) -> Any:
        self.started.append(LetterRows(self.config, prompt, n))
        return self.started[-1]

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        found = []
        for prompt, numbers in zip(prompts, ks, strict=True):
            rows = LetterRows(self.config, prompt, len(numbers))
            rows.draw(LONGEST)
            found.append(Candidates(rows.group(), Cost(rows.generated, rows.prefilled)))
        return found

    def embed(self, group: Group) -> Floats:
        raise NotImplementedError


def prompts_of(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"p{index}", "x", PROMPT_IDS) for index in range(count)]


def spent(generation: Generation) -> Cost:
    return replace(generation.cost, seconds=0.0)


def fits(observed: Counter[str], law: Mapping[str, float]) -> float:
    """The p-value of a chi-square test; outcomes that are rarely expected are put together."""
    draws = sum(observed.values())
    assert set(observed) <= {text for text, p in law.items() if p > 0}
    large = [text for text, p in law.items() if p * draws >= 8]
    seen, expected = [observed[text] for text in large], [law[text] * draws for text in large]
    assert len(large) >= 8
    seen.append(draws - sum(seen))
    expected.append(draws - sum(expected))
    return float(chisquare(seen, expected).pvalue)


# --- exact laws, written anew ---------------------------------------------------------------------

Pool = tuple[Ids, ...]


def grown(pool: Pool, tokens: int) -> Iterator[tuple[Pool, float]]:
    """The pools that further tokens may make of a pool, with their probabilities."""
    if tokens == 0:
        yield pool, 1.0
        return
    choices = [
        [(ids, 1.0)] if ended(ids) else [((*ids, t), p) for t, p in enumerate(following(ids))]
        for ids in pool
    ]
    for combination in itertools.product(*choices):
        p = math.prod(probability for _, probability in combination)
        for later, q in grown(tuple(ids for ids, _ in combination), tokens - 1):
            yield later, p * q


def ahead(pool: Pool) -> list[int]:
    return sorted(range(len(pool)), key=lambda row: (-reward_of(text_of(pool[row])), row))


def rejected(pool: Pool, alpha: float) -> Pool:
    live = [row for row in ahead(pool) if not ended(pool[row])]
    dropped = set(live[len(live) - math.floor(alpha * len(live)) :])
    return tuple(ids for row, ids in enumerate(pool) if row not in dropped)


def branched(pool: Pool, branch: int) -> tuple[Pool, Pool]:
    """The next layer's roots, and the whole completions that got no place in it."""
    order = ahead(pool)
    kept, lost = np.split(order, [math.ceil(len(pool) / branch)])
    leaves = [row for row in kept if ended(pool[row])]
    parents = [row for row in kept if not ended(pool[row])]
    copies = dict.fromkeys(leaves, 1)
    for place in range(len(pool) - len(leaves) if parents else 0):
        parent = parents[place % len(parents)]
        copies[parent] = copies.get(parent, 0) + 1
    children = [ids for row, ids in enumerate(pool) for _ in range(copies.get(row, 0))]
    return tuple(children), tuple(pool[row] for row in lost if ended(pool[row]))


def law_of(n: int, segment: int, prune: Callable[[Pool], tuple[Pool, Pool]]) -> dict[str, float]:
    """The answer's law, by all ways in which n rows may grow and be pruned every `segment`."""
    states: Counter[tuple[Pool, Pool]] = Counter({(((),) * n, ()): 1.0})  # type: ignore[dict-item]
    for _ in range(math.ceil(LONGEST / segment)):
        after: Counter[tuple[Pool, Pool]] = Counter()
        for (pool, aside), p in states.items():
            for later, q in grown(pool, segment):
                kept, lost = prune(later)
                # Of what has been set aside only the best can be the answer.
                best = sorted((*aside, *lost), key=lambda ids: -reward_of(text_of(ids)))[:1]
                after[kept, tuple(best)] += p * q
        states = after
    law: Counter[str] = Counter()
    for (pool, aside), p in states.items():
        law[max((text_of(ids) for ids in (*pool, *aside)), key=reward_of)] += p
    return dict(law)


def answers(strategy: Strategy, n: int, prompts: int) -> Counter[str]:
    source = LetterSource(n=n)
    found = strategy.generate(prompts_of(prompts), source, letter_reward)
    return Counter(generation.completion for generation in found)


@pytest.mark.parametrize(("n", "alpha", "tokens"), [(2, 0.5, 1), (3, 0.4, 2)])
def test_speculative_rejection_s_law_is_the_enumerated_one(
    n: int, alpha: float, tokens: int
) -> None:
    law = law_of(n, tokens, lambda pool: (rejected(pool, alpha), ()))
    assert sum(law.values()) == pytest.approx(1)
    strategy = SpeculativeRejection(alpha=alpha, checkpoint_tokens=tokens)
    observed = answers(strategy, n, 2_000)
    assert fits(observed, law) > 1e-3
    # The test can tell it from best-of-n, which never drops anything.
    assert fits(observed, law_of(n, LONGEST, lambda pool: (pool, ()))) < 1e-3


@pytest.mark.parametrize(("n", "branch", "layers"), [(2, 2, 3), (3, 2, 2)])
def test_treebon_s_law_is_the_enumerated_one(n: int, branch: int, layers: int) -> None:
    law = law_of(n, math.ceil(LONGEST / layers), lambda pool: branched(pool, branch))
    assert sum(law.values()) == pytest.approx(1)
    observed = answers(TreeBoN(layers=layers, branch=branch), n, 2_000)
    assert fits(observed, law) > 1e-3
    assert fits(observed, law_of(n, LONGEST, lambda pool: (pool, ()))) < 1e-3


# --- speculative rejection ------------------------------------------------------------------------


def first_letter(prompts: Sequence[Any], completions: Sequence[str]) -> list[int]:
    return [LETTERS.find(text[:1] or "?") for text in completions]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    n=st.integers(1, 12),
    alpha=st.floats(0, 0.99),
    tokens=st.integers(1, 4),
    seed=st.integers(0, 9),
    budget=st.none() | st.integers(len(PROMPT_IDS) + LONGEST, 80),
)
def test_a_reward_known_from_the_start_loses_nothing(
    n: int, alpha: float, tokens: int, seed: int, budget: int | None
) -> None:
    strategy = SpeculativeRejection(alpha=alpha, checkpoint_tokens=tokens, max_cache_tokens=budget)
    source = LetterSource(n=n, seed=seed)
    (found,) = strategy.generate(prompts_of(1), source, first_letter)
    started = source.started[0].next_k  # a budget may let fewer start
    alone = LetterSource(n=started, seed=seed)
    (best,) = BestOfN().generate(prompts_of(1), alone, first_letter)
    assert (found.reward, found.completion) == (best.reward, best.completion)
    if budget is not None:
        assert source.started[0].peak <= budget
        room = budget // (len(PROMPT_IDS) + min(tokens, LONGEST))
        assert started == min(n, room)


def test_rejected_rows_are_kept_as_they_were_and_never_chosen() -> None:
    strategy = SpeculativeRejection(alpha=0.5, checkpoint_tokens=1)
    source = LetterSource(n=8)
    generations = strategy.generate(prompts_of(50), source, letter_reward)
    assert len(generations) == 50
    for found in generations:
        group = found.group
        assert group.n == 8
        assert found.cost.generated == sum(group.lengths())
        assert found.cost.prefilled == len(PROMPT_IDS)
        assert group.rewards == tuple(map(reward_of, group.completions))
        whole = [why != "rejected" for why in group.finish_reasons]
        assert whole == sorted(whole, reverse=True)
        assert [ended(ids) for ids in group.token_ids] == whole
        assert found.reward == max(group.rewards[: sum(whole)])
        assert sorted(found.ranking()) == list(range(sum(whole)))


def test_the_fraction_is_rounded_down_and_leaves_a_row() -> None:
    assert survivors(100, 0.29) == 71
    assert [survivors(live, 0.5) for live in (0, 1, 2, 3, 4)] == [0, 1, 1, 2, 2]
    assert survivors(5, 0.999) == 1
    assert survivors(7, 0.0) == 7


def test_a_budget_without_room_for_a_row_is_refused() -> None:
    strategy = SpeculativeRejection(max_cache_tokens=len(PROMPT_IDS) + LONGEST - 1)
    with pytest.raises(
        BonbonError, match="max_cache_tokens 4 has no room for one row of prompt p0"
    ):
        strategy.generate(prompts_of(1), LetterSource(n=2), letter_reward)


# --- TreeBoN --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=12),
    branch=st.integers(1, 14),
)
def test_a_layer_keeps_the_best_and_has_as_many_rows(
    rows: list[tuple[int, bool]], branch: int
) -> None:
    scores, finished = np.array([float(score) for score, _ in rows]), [done for _, done in rows]
    copies = Counter(next_layer(scores, finished, branch))
    kept = math.ceil(len(rows) / branch)
    assert len(copies) == kept
    dropped = [scores[row] for row in range(len(rows)) if row not in copies]
    assert not dropped or max(dropped) <= min(scores[row] for row in copies)
    assert all(copies[row] == 1 for row in copies if finished[row])
    shares = [copies[row] for row in copies if not finished[row]]
    if shares:
        assert sum(copies.values()) == len(rows)
        assert max(shares) - min(shares) <= 1
    if branch == 1:
        assert next_layer(scores, finished, 1) == list(range(len(rows)))


def test_no_completion_is_scored_twice_at_the_same_length() -> None:
    # One token between scorings, so there are as many scorings as tokens.
    for strategy in (
        TreeBoN(layers=LONGEST, branch=2),
        SMC(checkpoint_tokens=1, ess_threshold=1.0, tau=0.1),
    ):
        generations = strategy.generate(prompts_of(20), LetterSource(n=6), letter_reward)
        assert len(generations) == 20
        for found in generations:
            assert found.cost.reward_calls == found.cost.generated > 6


# --- SMC ------------------------------------------------------------------------------------------

TAU = 0.5
EXACT = {text_of(ids): 0.0 for ids in completions_of()}
for ids, probability in completions_of().items():
    EXACT[text_of(ids)] += probability
NORMALISER = sum(p * math.exp(reward_of(text) / TAU) for text, p in EXACT.items())
# The expected number of a's under the tilt.
TILTED = sum(
    p * math.exp(reward_of(text) / TAU) / NORMALISER * text.count("a") for text, p in EXACT.items()
)


class MadeUpTwists(SMC):
    """Partial scores that have nothing to do with the reward."""

    def score(self, source: Any, reward: Any) -> Any:
        def score(group: Group, whole: Sequence[bool]) -> Floats:
            made_up = [0.3 * reward_of(text + "?") for text in group.completions]
            return np.where(whole, letter_reward((), group.completions), made_up)

        return score


@pytest.mark.parametrize("kind", [SMC, MadeUpTwists])
@pytest.mark.parametrize(("tokens", "threshold"), [(1, 1.0), (1, 0.6), (2, 1.0), (9, 0.5)])
def test_the_normaliser_s_estimate_is_unbiased(
    kind: type[SMC], tokens: int, threshold: float
) -> None:
    strategy = kind(tau=TAU, checkpoint_tokens=tokens, ess_threshold=threshold)
    found = strategy.generate(prompts_of(1_000), LetterSource(n=5), letter_reward)
    estimates = np.exp([log_normaliser(generation.group) for generation in found])
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert error < 0.05 * NORMALISER
    assert abs(estimates.mean() - NORMALISER) < 4 * error


def tilted_expectation(group: Group, values: list[int]) -> float:
    """Σ_i w_i f(y_i), SMC's estimate of E f(y) under π0(y) e^(r(y)/τ)/Z."""
    return float(np.array(values) @ np.array(group.metrics["weight"]))


def test_tilted_expectations_converge_as_one_over_the_square_root_of_n() -> None:
    strategy = SMC(tau=TAU, checkpoint_tokens=1, ess_threshold=0.7)
    errors = []
    for n in (8, 32, 128):
        found = strategy.generate(prompts_of(150), LetterSource(n=n), letter_reward)
        estimates = [
            tilted_expectation(g.group, [text.count("a") for text in g.group.completions])
            for g in found
        ]
        errors.append(math.sqrt(np.mean((np.array(estimates) - TILTED) ** 2)))
    rates = np.diff(np.log(errors)) / math.log(4)
    assert np.all((rates > -0.7) & (rates < -0.3)), (errors, rates)


def test_the_answer_s_law_tends_to_the_tilt() -> None:
    tilt = {text: p * math.exp(reward_of(text) / TAU) / NORMALISER for text, p in EXACT.items()}
    strategy = SMC(tau=TAU, checkpoint_tokens=1, ess_threshold=0.7)
    observed = answers(strategy, 64, 300)
    assert fits(observed, tilt) > 1e-3
    assert fits(observed, EXACT) < 1e-3


def test_weights_sum_to_one_and_the_group_holds_the_particles() -> None:
    strategy = SMC(tau=0.2, checkpoint_tokens=1, ess_threshold=1.0)
    generations = strategy.generate(prompts_of(20), LetterSource(n=6), letter_reward)
    assert len(generations) == 20
    for found in generations:
        assert found.group.n == 6
        assert sum(found.group.metrics["weight"]) == pytest.approx(1)
        assert found.group.metrics["weight"][found.chosen] > 0
        assert found.group.rewards == tuple(map(reward_of, found.group.completions))


def test_a_tau_whose_weights_overflow_is_refused() -> None:
    with pytest.raises(BonbonError, match="tau is too small"):
        SMC(tau=1e-320).generate(prompts_of(1), LetterSource(n=2), letter_reward)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5]), min_size=1, max_size=9).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_systematic_resampling_takes_each_particle_as_often_as_its_weight(
    weights: list[float], uniform: float
) -> None:
    n, share = len(weights), np.array(weights) / sum(weights)
    taken = np.bincount(systematic_ancestors(weights, uniform), minlength=n)
    assert taken.sum() == n
    assert np.all(np.abs(taken - n * share) < 1 + 1e-9)
    assert not np.any(taken[share == 0])
    evenly = (np.arange(100) + 0.5) / 100
    counts = [np.bincount(systematic_ancestors(weights, u), minlength=n) for u in evenly]
    np.testing.assert_allclose(np.mean(counts, axis=0), n * share, atol=0.05)


def test_weight_functions_in_closed_form() -> None:
    assert effective_sample_size([3.0] * 7) == pytest.approx(7)
    assert effective_sample_size([0.0, -np.inf, -np.inf]) == pytest.approx(1)
    assert effective_sample_size(np.log([1.0, 3.0])) == pytest.approx(16 / 10)
    assert log_mean_exp(np.log([1.0, 2.0, 6.0]) + 2_000) == pytest.approx(math.log(3) + 2_000)


def test_genlm_s_smc_has_the_same_target() -> None:
    """An independent implementation of twisted SMC, resampling at every token."""
    genlm = pytest.importorskip("genlm.control", reason="genlm-control is not installed")

    class Language(genlm.Potential):
        async def complete(self, context: list[int]) -> float:
            return await self.prefix([*context, END])

        async def prefix(self, context: list[int]) -> float:
            steps = [following(tuple(context[:t]))[token] for t, token in enumerate(context)]
            return float(np.log(steps).sum())

        async def logw_next(self, context: list[int]) -> Any:
            return self.make_lazy_weights(np.log(following(tuple(context))))

    class Twist(genlm.Potential):
        async def complete(self, context: list[int]) -> float:
            return reward_of(text_of(tuple(context))) / TAU

        prefix = complete

    language, twist = Language([0, 1, 2]), Twist([0, 1, 2])
    smc = genlm.sampler.SMC(genlm.direct_token_sampler(language), critic=twist)
    np.random.seed(0)
    torch.manual_seed(0)

    async def estimate() -> float:
        particles = await smc(
            n_particles=5,
            ess_threshold=0.99,
            max_tokens=99,
            resampling_method="systematic",
            terminate_when=lambda context: len(context) == LONGEST,
        )
        return math.exp(particles.log_ml)

    async def estimates() -> list[float]:
        return [await estimate() for _ in range(400)]

    theirs = np.array(asyncio.run(estimates()))
    strategy = SMC(tau=TAU, checkpoint_tokens=1, ess_threshold=0.99)
    found = strategy.generate(prompts_of(400), LetterSource(n=5), letter_reward)
    ours = np.exp([log_normaliser(generation.group) for generation in found])
    error = math.hypot(*(x.std(ddof=1) / math.sqrt(len(x)) for x in (theirs, ours)))
    assert abs(theirs.mean() - ours.mean()) < 4 * error < 0.4 * NORMALISER
    assert abs(theirs.mean() - NORMALISER) < 4 * theirs.std(ddof=1) / math.sqrt(len(theirs))
    # As noisy as each other: the same algorithm, up to the random numbers.
    assert 0.7 < theirs.std() / ours.std() < 1.4


# --- real rows ------------------------------------------------------------------------------------

VOCABULARY = 6
PROMPT = EncodedPrompt("p0", "x", (1, 5, 4))


def six_token_model(end_bias: float = 0.0) -> LlamaForCausalLM:
    """Six tokens, the end token among them, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = tiny_llama_config(vocab_size=VOCABULARY, num_hidden_layers=1)
        model = LlamaForCausalLM(config)
    if end_bias:
        bias = torch.zeros(VOCABULARY)
        bias[EOS] = end_bias
        model.lm_head.bias = torch.nn.Parameter(bias)
    return model.double().eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return six_token_model()


class SpiedSource(LocalSource):
    """Sees its rows' cache after every token."""

    def __init__(self, model: LlamaForCausalLM, **changes: Any) -> None:
        config = SamplingConfig(**changes)
        super().__init__(model, byte_tokenizer(), config, progress=self._look)
        self.seen: list[tuple[int, torch.Size, int]] = []

    def start(self, prompt: EncodedPrompt, n: int) -> Any:
        self.rows = super().start(prompt, n)
        return self.rows

    def _look(self, _: int) -> None:
        if self.rows.cache_tokens():
            keys = self.rows._cache.layers[0].keys
            self.seen.append(
                (self.rows.cache_tokens(), keys.shape, keys.untyped_storage().nbytes())
            )


def assert_same_draws(ours: Generation, theirs: Generation) -> None:
    """The same candidates, rewards, choice and cost; metrics apart."""
    np.testing.assert_allclose(ours.group.logprobs, theirs.group.logprobs, rtol=1e-12)
    bare = [replace(g.group, logprobs=(0.0,) * g.group.n, metrics={}) for g in (ours, theirs)]
    assert bare[0] == bare[1]
    assert (ours.chosen, spent(ours)) == (theirs.chosen, spent(theirs))


def source_of(model: LlamaForCausalLM, **changes: Any) -> LocalSource:
    return LocalSource(model, byte_tokenizer(), SamplingConfig(**changes))


def real_prompts(count: int = 2) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"p{i}", "x", (1, 5, 4, 3, 5)[: 2 + i]) for i in range(count)]


def length_and_letters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [len(text) + 0.37 * text.count('"') + 0.01 * reward_of(text) for text in completions]


@pytest.mark.parametrize(
    "strategy",
    [
        SpeculativeRejection(alpha=0.0, checkpoint_tokens=2),
        SpeculativeRejection(alpha=0.0, max_cache_tokens=10_000),
        TreeBoN(branch=1, layers=4),
        TreeBoN(branch=1, layers=1),
        TreeBoN(branch=3, layers=1),
    ],
    ids=repr,
)
def test_what_drops_nothing_is_best_of_n(model: Any, strategy: Strategy) -> None:
    source = source_of(model, n=7, max_new_tokens=9)
    found = strategy.generate(real_prompts(), source, length_and_letters)
    best = BestOfN().generate(real_prompts(), source, length_and_letters)
    assert len(found) == len(real_prompts())
    for ours, theirs in zip(found, best, strict=True):
        assert_same_draws(ours, theirs)


@pytest.mark.parametrize(
    "strategy",
    [SMC(tau=0.7, checkpoint_tokens=9), SMC(tau=0.7, checkpoint_tokens=2, ess_threshold=0)],
    ids=repr,
)
def test_smc_without_resampling_is_soft_best_of_n(model: Any, strategy: Strategy) -> None:
    source = source_of(model, n=7, max_new_tokens=9)
    found = strategy.generate(real_prompts(), source, length_and_letters)
    soft = SoftBestOfN(tau=0.7).generate(real_prompts(), source, length_and_letters)
    assert len(found) == len(real_prompts())
    for ours, theirs in zip(found, soft, strict=True):
        assert_same_draws(ours, theirs)
        weights = SoftBestOfN(tau=0.7).weights(theirs.group, source)
        np.testing.assert_allclose(ours.group.metrics["weight"], weights)
        exact = np.mean(np.exp(np.array(theirs.group.rewards) / 0.7))
        assert log_normaliser(ours.group) == pytest.approx(math.log(exact))


STEPWISE = [
    SpeculativeRejection(alpha=0.5, checkpoint_tokens=2),
    TreeBoN(layers=4, branch=2),
    SMC(tau=1.0, checkpoint_tokens=2, ess_threshold=0.9),
]


@pytest.mark.parametrize("strategy", STEPWISE, ids=repr)
def test_real_rows_are_pruned_reproducibly(model: Any, strategy: Strategy) -> None:
    def run(seed: int, *prompts: EncodedPrompt) -> list[tuple[Group, int, Cost]]:
        source = source_of(model, n=8, max_new_tokens=9, seed=seed)
        found = strategy.generate(prompts, source, length_and_letters)
        return [(f.group, f.chosen, spent(f)) for f in found]

    both = run(0, *real_prompts())
    assert both[1:] == run(0, real_prompts()[1])  # whatever its neighbours
    assert both[1:] != run(1, real_prompts()[1])
    for (group, chosen, cost), prompt in zip(both, real_prompts(), strict=True):
        assert cost.prefilled == len(prompt.token_ids)
        assert group.finish_reasons[chosen] != "rejected"
        assert group.rewards == pytest.approx(length_and_letters((), group.completions))


@pytest.mark.parametrize("strategy", STEPWISE, ids=repr)
def test_a_source_of_whole_draws_is_refused(model: Any, strategy: Strategy) -> None:
    whole = SimpleNamespace(config=SamplingConfig(n=2), draw=None, embed=None)
    with pytest.raises(BonbonError, match="which needs a model in this process"):
        strategy.generate(real_prompts(), whole, length_and_letters)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass one"):
        strategy.generate(real_prompts(), source_of(model, n=2), None)


@pytest.mark.parametrize("seed", range(6))
def test_the_cache_stays_within_its_budget_where_many_rows_end(seed: int) -> None:
    """Rows that have ended hold their lines until an eighth can go, or a checkpoint comes."""
    model, budget = six_token_model(end_bias=-1.5), 260
    source = SpiedSource(model, n=40, max_new_tokens=30, seed=seed)
    strategy = SpeculativeRejection(alpha=0.25, checkpoint_tokens=2, max_cache_tokens=budget)
    strategy.generate([PROMPT], source, length_and_letters)
    assert max(held for held, _, _ in source.seen) <= budget
    assert max(held for held, _, _ in source.seen) > 0.8 * budget


@pytest.mark.parametrize("alpha", [0.5, 0.999999999999])
def test_one_row_goes_on_and_is_chosen(model: Any, alpha: float) -> None:
    strategy = SpeculativeRejection(alpha=alpha, checkpoint_tokens=1)
    for n in (1, 5):
        source = source_of(model, n=n, max_new_tokens=6)
        (found,) = strategy.generate([PROMPT], source, length_and_letters)
        assert found.group.finish_reasons[found.chosen] != "rejected"


def test_the_cache_stays_within_its_budget_and_shrinks() -> None:
    model, budget = six_token_model(end_bias=-3.0), 120
    free = SpiedSource(model, n=16, max_new_tokens=30)
    SpeculativeRejection(alpha=0.0).generate([PROMPT], free, length_and_letters)
    assert max(held for held, _, _ in free.seen) > budget  # or nothing would be shown
    source = SpiedSource(model, n=16, max_new_tokens=30)
    strategy = SpeculativeRejection(alpha=0.25, checkpoint_tokens=4, max_cache_tokens=budget)
    (found,) = strategy.generate([PROMPT], source, length_and_letters)
    lines = [shape[0] for _, shape, _ in source.seen]
    assert lines[0] == found.group.n == 16
    assert lines == sorted(lines, reverse=True)
    assert lines[-1] < 8
    assert "rejected" in found.group.finish_reasons
    for held, (rows, heads, columns, width), storage in source.seen:
        assert rows * columns == held <= budget
        assert storage <= rows * heads * (columns + 64) * width * 8  # a block of spare columns
    assert source.rows.cache_tokens() == 0


def test_branches_share_the_reading_of_their_prefix(model: Any) -> None:
    read: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    source = source_of(model, n=8, max_new_tokens=12)
    (found,) = TreeBoN(layers=4, branch=4).generate([PROMPT], source, length_and_letters)
    hook.remove()
    assert read[0] == 3
    assert sum(read[1:]) <= found.cost.generated
    assert found.group.n > 8  # pruned ones are kept


# --- implicit rewards -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that is a little unlike `model`."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    changed = six_token_model()
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def plain_log_probs(model: Any, prompt: Ids, ids: Ids, temperature: float) -> Floats:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).numpy()


def test_the_weighted_implicit_reward_in_closed_form() -> None:
    assert weighted_implicit_reward([]) == 0
    assert weighted_implicit_reward([0.5, -3.0, 6.0]) == pytest.approx(0.5 - 1.5 + 2.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_log_ratios_are_those_of_plain_forward_passes(
    model: Any, tuned: Path, temperature: float
) -> None:
    source = source_of(model, n=8, max_new_tokens=9, temperature=temperature)
    rows = source.start(PROMPT, 8)
    rows.draw(5)
    group = rows.group()
    other = load_policy(str(tuned))[0].double()
    found = token_log_ratios(str(tuned), source)(group)
    assert len(group.token_ids) == 8
    for ids, ratios in zip(group.token_ids, found, strict=True):
        ours, theirs = (
            plain_log_probs(m, PROMPT.token_ids, ids, temperature) for m in (other, model)
        )
        assert np.abs(ours - theirs).max() > 0.01
        np.testing.assert_allclose(ratios, ours - theirs, atol=1e-9)


def test_treebon_with_an_implicit_reward(model: Any, tuned: Path) -> None:
    partial = {"implicit": str(tuned)}
    strategy = TreeBoN.model_validate({"layers": 4, "branch": 3, "partial": partial})
    source = source_of(model, n=9, max_new_tokens=9)
    log_ratios = token_log_ratios(str(tuned), source)
    generations = strategy.generate(real_prompts(), source, length_and_letters)
    assert len(generations) == len(real_prompts())
    for found in generations:
        group = found.group
        whole = [why != "rejected" for why in group.finish_reasons]
        assert not all(whole)
        implicit = [weighted_implicit_reward(ratios) for ratios in log_ratios(group)]
        final = length_and_letters((), group.completions)
        np.testing.assert_allclose(group.rewards, np.where(whole, final, implicit), atol=1e-9)
        assert found.reward == max(r for r, is_whole in zip(final, whole, strict=True) if is_whole)


def test_smc_with_an_implicit_reward_keeps_its_target(model: Any, tuned: Path) -> None:
    strategy = SMC.model_validate(
        {"checkpoint_tokens": 1, "ess_threshold": 1.0, "partial": {"implicit": str(tuned)}}
    )
    source = source_of(model, n=32, max_new_tokens=2)
    prompts = [replace(PROMPT, prompt_id=f"p{index}") for index in range(40)]
    found = strategy.generate(prompts, source, length_and_letters)
    estimates = np.exp([log_normaliser(generation.group) for generation in found])
    exact = 0.0
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        if first == EOS and second != EOS:
            continue  # it ends after one token, and is counted once
        ids = (first,) if first == EOS else (first, second)
        p = math.exp(plain_log_probs(model, PROMPT.token_ids, ids, 1.0).sum())
        text = completion_text(source.tokenizer, PROMPT.token_ids, ids)
        exact += p * math.exp(length_and_letters((), [text])[0])
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert error < 0.05 * exact
    assert abs(estimates.mean() - exact) < 4 * error
    for generation in found:
        texts = generation.group.completions
        assert generation.group.rewards == pytest.approx(length_and_letters((), texts))


def test_smc_s_implicit_twist_is_the_ratio_of_the_policies(model: Any, tuned: Path) -> None:
    strategy = SMC.model_validate({"tau": 0.3, "partial": {"implicit": str(tuned)}})
    source = source_of(model, n=4, max_new_tokens=9)
    rows = source.start(PROMPT, 4)
    rows.draw(3)
    group = rows.group()
    whole = [False, True, False, True]
    log_twists = strategy.score(source, length_and_letters)(group, whole) / 0.3
    rewards = length_and_letters((), group.completions)
    other = load_policy(str(tuned))[0].double()
    assert len(group.token_ids) == 4
    for row, ids in enumerate(group.token_ids):
        ours, theirs = (plain_log_probs(m, PROMPT.token_ids, ids, 1.0) for m in (other, model))
        expected = rewards[row] / 0.3 if whole[row] else (ours - theirs).sum()
        assert log_twists[row] == pytest.approx(expected)


def test_a_tuned_model_of_another_vocabulary_is_refused(tiny_model: Path, tuned: Path) -> None:
    base, tokenizer = load_policy(str(tiny_model))  # of more tokens than the tuned one
    strategy = TreeBoN.model_validate({"partial": {"implicit": str(tuned)}})
    source = LocalSource(base, tokenizer, SamplingConfig(n=2))
    with pytest.raises(BonbonError, match="has another vocabulary than the base model"):
        strategy.generate([PROMPT], source, length_and_letters)
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    source = LocalSource(six_token_model(), other, SamplingConfig(n=2))
    with pytest.raises(BonbonError, match="has another vocabulary than the base model"):
        strategy.generate([PROMPT], source, length_and_letters)
    with pytest.raises(BonbonError, match="set partial to reward"):
        strategy.generate([PROMPT], LetterSource(n=2), letter_reward)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"name": "speculative_rejection", "alpha": 0.3, "max_cache_tokens": 4_096},
        {"name": "tree_bon", "layers": 2, "partial": {"implicit": "./tuned"}},
        {"name": "smc", "tau": 0.5, "ess_threshold": 1.0},
    ],
)
def test_settings_survive_their_description(value: dict[str, Any]) -> None:
    strategy = parse_strategy(value)
    assert isinstance(strategy, Stepwise)
    assert strategy.stepwise
    assert describe_strategy(strategy) == value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"name": "speculative_rejection", "alpha": 1.0}, "alpha"),
        ({"name": "speculative_rejection", "checkpoint_tokens": 0}, "checkpoint_tokens"),
        ({"name": "tree_bon", "branch": 0}, "branch"),
        ({"name": "tree_bon", "partial": "logits"}, "partial"),
        ({"name": "smc", "tau": 0.0}, "tau"),
        ({"name": "smc", "ess_threshold": 1.5}, "ess_threshold"),
    ],
)
def test_settings_out_of_range_are_named(value: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        parse_strategy(value)
