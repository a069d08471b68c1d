"""Planning a cluster: against closed forms of production lines, brute force, simpy and figures by
hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.config.run import load_config
from bonbon.groups.shards import write_shard
from bonbon.planning.cluster import (
    ClusterConfig,
    ClusterPlan,
    load_cluster,
    plan_cluster,
    plan_from_files,
)
from bonbon.planning.cluster import on_paper as estimates
from bonbon.planning.cluster.config import LengthsConfig
from bonbon.planning.cluster.on_paper import Accelerator, ModelShape
from bonbon.planning.cluster.simulation import (
    Failures,
    Pool,
    closed_form_seconds,
    simulate,
    stage_seconds,
)
from bonbon.planning.cluster.splits import MOST_SPLITS, placements
from bonbon.planning.cluster.tables import plan_sentences, shown_value
from bonbon.planning.cluster.workload import (
    DrawLengths,
    Work,
    decode_steps,
    pilot_lengths,
    shard_work,
    stated_lengths,
)
from bonbon.system.errors import BonbonError
from support.groups import group_of
from support.paths import REPO
from support.profiles import quick

EXAMPLES = sorted((REPO / "examples").glob("*/cluster.yaml"))

LLAMA_8B = ModelShape(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
)
LLAMA_70B = LLAMA_8B.model_copy(
    update={
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    }
)
H100 = Accelerator(memory_gb=80, bandwidth_gb_per_second=3350, tflops=989)


# --- on paper -------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """The parameter counts of Meta's checkpoints, and their KV caches by hand."""
    assert estimates.parameter_count(LLAMA_8B) == 8_030_261_248
    assert estimates.parameter_count(LLAMA_70B) == 70_553_706_496
    assert estimates.kv_bytes_per_token(LLAMA_8B) == 131_072  # 2 · 32 · 8 · 128 · 2
    assert estimates.kv_bytes_per_token(LLAMA_70B) == 327_680


@pytest.mark.slow
def test_sizes_are_those_of_transformers_and_peft() -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        shape = ModelShape(
            num_hidden_layers=3,
            hidden_size=24,
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,  # not hidden_size / heads
            vocab_size=50,
            tie_word_embeddings=tied,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape.model_dump()))
        assert sum(p.numel() for p in model.parameters()) == estimates.parameter_count(shape)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trained == estimates.lora_parameter_count(shape, 4)


def test_decoding_by_hand() -> None:
    """8 B on an H100: 16.06 GB of weights and 256 rows · 384 tokens · 131,072 bytes a step."""
    speed = estimates.decode_speed(LLAMA_8B, H100, 1, rows=256, context=384)
    assert speed.step_seconds(256) == pytest.approx((16.0605e9 + 12.8849e9) / 3.35e12, rel=1e-4)
    assert speed.step_seconds(256) == pytest.approx(8.64e-3, rel=1e-3)
    assert speed.tokens_per_second(256) == pytest.approx(29_628, rel=1e-3)
    half = estimates.decode_speed(LLAMA_8B, H100, 1, 256, 384, 0.5).tokens_per_second(256)
    assert half == pytest.approx(speed.tokens_per_second(256) / 2)
    # 2,000 rows: 2 · 8.03e9 · 2000 FLOPs take longer than reading the weights.
    many = estimates.decode_speed(LLAMA_8B, H100, 1, rows=2000, context=384)
    assert many.fixed == pytest.approx(3.2121e13 / 989e12, rel=1e-4)
    assert many.per_row == pytest.approx(speed.per_row)


def test_memory_by_hand() -> None:
    # (0.9 · 80 GB − 16.06 GB) / (131,072 · 512 bytes a row)
    assert estimates.rows_that_fit(LLAMA_8B, H100, 1, 512) == 833
    assert estimates.rows_that_fit(LLAMA_70B, H100, 1, 512) < 0
    assert estimates.training_state_bytes(LLAMA_8B) == pytest.approx(128.48e9, rel=1e-4)
    # Rank 16 on 70 B: 80 · 16 · (2 · 16384 + 2 · 9216 + 3 · 36864) = 207,093,760 weights.
    assert estimates.lora_parameter_count(LLAMA_70B, 16) == 207_093_760
    lora = estimates.training_state_bytes(LLAMA_70B, "lora", 16)
    assert lora == pytest.approx(141.107e9 + 3.3135e9, rel=1e-4)
    # 68.451 G weights at 4.127 bits, 2.103 G at 32 bits, and the adapter.
    qlora = estimates.training_state_bytes(LLAMA_70B, "qlora", 16)
    assert qlora == pytest.approx(35.312e9 + 8.411e9 + 3.3135e9, rel=1e-3)
    assert estimates.checkpoint_bytes(LLAMA_70B, 4096) == 2 * 80 * 8192 * 4096


def test_flops_by_hand() -> None:
    tokens = 1e6
    forward = estimates.forward_flops(LLAMA_8B, tokens)
    assert forward == pytest.approx(1.606e16, rel=1e-3)
    passes = {
        (method, again): estimates.training_flops(LLAMA_8B, tokens, method, again) / forward
        for method in ("full", "lora", "qlora")
        for again in (False, True)
    }
    assert passes == {
        ("full", False): 3, ("full", True): 4, ("lora", False): 2, ("lora", True): 3,
        ("qlora", False): 2, ("qlora", True): 3,
    }  # fmt: skip
    assert estimates.hours_at(989e12 * 3600, H100, 2, 0.25) == pytest.approx(2.0)
    speed = estimates.forward_tokens_per_second(LLAMA_8B, H100, 2, 0.4)
    assert speed == pytest.approx(2 * 989e12 * 0.4 / (2 * 8_030_261_248))


# --- the seconds of a shard -----------------------------------------------------------------------


def steps_one_by_one(lengths: Sequence[int], rows: int, continuous: bool) -> int:
    """Decoding as it is: a step takes a token off every row; ended rows make place."""
    waiting, going, steps = list(lengths), list[int](), 0
    while waiting or going:
        if continuous or not going:
            while waiting and len(going) < rows:
                going.append(waiting.pop(0))
        steps += 1
        going = [left - 1 for left in going if left > 1]
    return steps


@quick
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(1, 9),
    st.booleans(),
)
def test_decoding_step_by_step(shards: list[list[int]], rows: int, continuous: bool) -> None:
    found = decode_steps(np.array(shards, dtype=np.int32), rows, continuous)
    assert found.tolist() == [steps_one_by_one(shard, rows, continuous) for shard in shards]


def cluster_of(**changes: Any) -> ClusterConfig:
    """8 GPUs; 3 prompts a shard, 2 completions each."""
    values: dict[str, Any] = {
        "job": {
            "prompts": 40,
            "n": 2,
            "prompt_tokens": {"mean": 10},
            "completion_tokens": {"mean": 20},
            "shard_size": 3,
        },
        "cluster": {"price_per_gpu_hour": 2.0},
        "sampler": {"rows": 4, "decode_tokens_per_second": 8, "prefill_tokens_per_second": 5},
        "scorer": {"tokens_per_second": 30},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            values[part] = values.get(part, {}) | {name: value}
        else:
            values[part] = value
    return ClusterConfig.model_validate(values)


def job_of(config: ClusterConfig) -> tuple[DrawLengths, int]:
    job = config.job
    assert job.n is not None
    assert job.prompt_tokens is not None
    assert job.completion_tokens is not None
    return stated_lengths(job.prompt_tokens, job.completion_tokens, job.n), job.n


def planned(config: ClusterConfig) -> ClusterPlan:
    return plan_cluster(config, *job_of(config))


def work_of(config: ClusterConfig) -> Work:
    return shard_work(config, *job_of(config))


def test_seconds_of_shards_by_hand() -> None:
    """40 prompts are 13 shards of 3 and one of 1."""
    work = work_of(cluster_of())
    # 6 rows of 20 tokens in places of 4 take 40 steps of half a second, and 30 prompt tokens.
    assert work.sample_seconds.tolist() == [40 * 0.5 + 30 / 5] * 13 + [20 * 0.5 + 10 / 5]
    assert work.score_seconds.tolist() == [6 * 30 / 30] * 13 + [2 * 30 / 30]
    assert (work.prompt_tokens, work.completion_tokens) == (10, 20)
    assert work.total_tokens == 40 * 2 * 30
    counted = work_of(cluster_of(scorer={"completions_per_second": 4}))
    assert counted.score_seconds.tolist() == [6 / 4] * 13 + [2 / 4]
    shared = work_of(cluster_of(scorer__shared_prompt=True))
    assert shared.score_seconds.tolist() == [(3 * 10 + 6 * 20) / 30] * 13 + [(10 + 2 * 20) / 30]
    assert (shared.scored_tokens, shared.total_tokens) == (40 * 50, work.scored_tokens)


def test_an_estimated_step_is_shorter_with_fewer_rows() -> None:
    """Seconds are steps · weights and tokens · KV, whichever way the rows are packed."""
    config = cluster_of(
        gpu=H100, model=LLAMA_8B, sampler={"rows": 4, "utilisation": 1, "prefill_utilisation": 1}
    )
    seconds = work_of(config).sample_seconds[0]
    weights = 40 * 16_060_522_496 / 3.35e12
    kv = 120 * 131_072 * (10 + 20 / 2) / 3.35e12
    assert seconds == pytest.approx(weights + kv + 30 * 16_060_522_496 / 989e12)


def test_drawn_lengths() -> None:
    rng = np.random.default_rng(0)
    draw = stated_lengths(LengthsConfig(mean=50, spread=20), LengthsConfig(mean=100, spread=10), 3)
    prompts, completions = draw(rng, 20_000)
    assert (prompts.shape, completions.shape) == ((20_000,), (20_000, 3))
    assert prompts.mean() == pytest.approx(50, abs=4 * 20 / 20_000**0.5)
    assert prompts.std() == pytest.approx(20, rel=0.03)
    assert completions.std() == pytest.approx(10, rel=0.03)
    cut = stated_lengths(LengthsConfig(mean=50, spread=40, longest=60), LengthsConfig(mean=9), 1)
    assert cut(rng, 1000)[0].max() == 60
    assert cut(rng, 1000)[0].min() >= 1


def test_a_pilots_lengths_stay_with_their_prompt() -> None:
    groups = [
        group_of("a", prompt_token_ids=(1,) * 5, token_ids=((1,) * 10, (1,) * 12, (1,) * 14)),
        group_of("b", prompt_token_ids=(1,) * 7, token_ids=((1,) * 30, (1,) * 40, (1,) * 50)),
    ]
    prompts, completions = pilot_lengths(groups, 3)(np.random.default_rng(0), 400)
    for length, allowed in ((5, {10, 12, 14}), (7, {30, 40, 50})):
        assert set(completions[prompts == length].ravel().tolist()) == allowed
    assert set(prompts.tolist()) == {5, 7}


# --- the line -------------------------------------------------------------------------------------


def pool(replicas: int, seconds: Any, startup: float = 0.0) -> Pool:
    return Pool(((0,),) * replicas, startup, np.asarray(seconds, dtype=np.float64))


def line_of_two(sampling: Sequence[float], scoring: Sequence[float], places: int) -> list[float]:
    """When each shard is scored by one sampler and one scorer with `places` between them.

    The recursion of a two-machine line that blocks after service: a shard leaves the sampler when
    it is drawn and the shard `places` before it has begun to be scored.
    """
    leaves = ended = 0.0
    began: list[float] = []
    scored = []
    for i, (draw, score) in enumerate(zip(sampling, scoring, strict=True)):
        drawn = leaves + draw
        if places:
            leaves = max(drawn, began[i - places] if i >= places else 0.0)
        else:
            leaves = max(drawn, ended)
        began.append(max(leaves, ended))
        ended = began[-1] + score
        scored.append(ended)
    return scored


seconds_of = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=12).map(
    lambda pairs: [list(side) for side in zip(*pairs, strict=True)]
)


@quick
@given(seconds_of, st.integers(0, 4))
def test_one_sampler_and_one_scorer(seconds: list[list[float]], places: int) -> None:
    found = simulate(pool(1, seconds[0]), pool(1, seconds[1]), places)
    assert found.scored_at.tolist() == pytest.approx(line_of_two(*seconds, places))


@quick
@given(seconds_of)
def test_the_two_machine_flow_shop(seconds: list[list[float]]) -> None:
    """Johnson's makespan: the longest path, which turns from sampling to scoring at one shard."""
    sampling, scoring = seconds
    count = len(sampling)
    makespan = max(sum(sampling[: k + 1]) + sum(scoring[k:]) for k in range(count))
    assert simulate(pool(1, sampling), pool(1, scoring), count).seconds == pytest.approx(makespan)


@pytest.mark.parametrize("places", [0, 1, 5])
@pytest.mark.parametrize(("draw", "score"), [(3.0, 2.0), (2.0, 3.0), (2.0, 2.0)])
def test_equal_shards_on_equal_pools(draw: float, score: float, places: int) -> None:
    """k lines side by side: the first shard, the slower stage for the rest, the last one's end."""
    found = simulate(pool(4, [draw] * 20, 10), pool(4, [score] * 20, 1), places)
    assert found.seconds == pytest.approx(10 + draw + 4 * max(draw, score) + score)
    assert found.sampler_busy == pytest.approx(5 * draw / found.seconds)
    assert found.scorer_busy == pytest.approx(5 * score / found.seconds)


def test_blocked_samplers_are_counted() -> None:
    """Two shards, no place: the second waits from 2 to 6 seconds."""
    found = simulate(pool(1, [1.0, 1.0]), pool(1, [5.0, 5.0]), 0)
    assert found.seconds == 11
    assert found.sampler_blocked == pytest.approx(4 / 11)
    assert found.most_waiting == 0


def test_the_sampler_that_has_waited_longest_hands_over_first() -> None:
    found = simulate(pool(3, [1.0, 2.0, 3.0]), pool(1, [10.0] * 3), 0)
    assert found.scored_at.tolist() == [11, 21, 31]


def by_simpy(samplers: Pool, scorers: Pool, places: int) -> list[float]:
    """When each shard is scored, by another simulator; from one place on."""
    simpy = pytest.importorskip("simpy", reason="simpy, another simulator, is not installed")
    env = simpy.Environment()
    count = len(samplers.seconds)
    store, todo, scored = simpy.Store(env, places), iter(range(count)), [0.0] * count

    def sampler() -> Any:
        yield env.timeout(samplers.startup)
        for shard in todo:
            yield env.timeout(samplers.seconds[shard])
            yield store.put(shard)

    def scorer() -> Any:
        yield env.timeout(scorers.startup)
        while True:
            shard = yield store.get()
            yield env.timeout(scorers.seconds[shard])
            scored[shard] = env.now

    for process, replicas in ((sampler, samplers.nodes), (scorer, scorers.nodes)):
        for _ in replicas:
            env.process(process())
    env.run()
    return scored


def test_the_same_as_simpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        count, places, a, b = (int(x) for x in rng.integers(1, 8, 4) * (8, 1, 1, 1))
        seconds = rng.gamma(3, 1, (2, count))
        pools = pool(a, seconds[0], rng.uniform(0, 5)), pool(b, seconds[1], 2)
        assert simulate(*pools, places).scored_at.tolist() == by_simpy(*pools, places)


@pytest.mark.slow
@quick
@given(seconds_of, st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.floats(0, 9))
def test_bounds_of_any_line(
    seconds: list[list[float]], a: int, b: int, places: int, startup: float
) -> None:
    """Every shard is scored; no faster than the slower stage alone; and one stage always works.

    The last is Graham's bound: while shards are left, all samplers or all scorers are at work.
    """
    pools = pool(a, seconds[0], startup), pool(b, seconds[1], startup)
    found = simulate(*pools, places)
    assert np.isfinite(found.scored_at).all()
    assert found.seconds == found.scored_at.max()
    assert (found.scored_at >= startup + np.add(*seconds) - 1e-9).all()
    assert found.most_waiting <= places
    assert found.redone == found.failures == 0
    assert found.seconds >= closed_form_seconds(*pools) - 1e-9
    at_most = startup + sum(sum(s) / k + max(s) for s, k in zip(seconds, (a, b), strict=True))
    assert found.seconds <= at_most + 1e-9
    for busy, side, k in zip((found.sampler_busy, found.scorer_busy), seconds, (a, b), strict=True):
        assert busy * k * found.seconds == pytest.approx(sum(side))


@quick
@given(seconds_of, st.integers(1, 4))
def test_a_stage_alone(seconds: list[list[float]], replicas: int) -> None:
    """That of a line whose other stage takes no time."""
    stage, other = pool(replicas, seconds[0], 2.0), pool(1, [0.0] * len(seconds[0]))
    assert stage_seconds(stage) == pytest.approx(simulate(stage, other, 1).seconds)
    assert stage_seconds(stage) == pytest.approx(simulate(other, stage, 1).seconds)


@quick
@given(
    st.integers(1, 20), st.floats(0.1, 9), st.floats(0.1, 9),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.floats(0, 5),
)  # fmt: skip
def test_more_of_anything_takes_no_longer(
    shards: int, draw: float, score: float, a: int, b: int, places: int, startup: float
) -> None:
    """For equal shards; unequal ones may come to the scorers in a less lucky order."""

    def seconds(a: int, b: int, places: int) -> float:
        return simulate(
            pool(a, [draw] * shards, startup), pool(b, [score] * shards), places
        ).seconds

    now = seconds(a, b, places) + 1e-9
    assert seconds(a + 1, b, places) <= now
    assert seconds(a, b + 1, places) <= now
    assert seconds(a, b, places + 1) <= now


# --- failures -------------------------------------------------------------------------------------


def nodes(count: int, seconds: Any, startup: float = 0.0) -> Pool:
    return Pool(tuple((k,) for k in range(count)), startup, np.asarray(seconds, dtype=np.float64))


def test_expected_time_with_failures() -> None:
    """A shard of s seconds with restarts takes (1/λ + repair)(e^(λs) − 1) on average.

    One sampler on a node that fails; scoring takes next to nothing, and elsewhere.
    """
    mean, repair, seconds, shards = 10.0, 3.0, 8.0, 4000
    samplers = Pool(((0,),), 0.0, np.full(shards, seconds))
    scorers = Pool(((1,),), 0.0, np.full(shards, 1e-9))
    found = simulate(samplers, scorers, 1, Failures(mean, repair, seed=1))
    took = np.diff(np.concatenate([[0.0], found.scored_at]))
    expected = (mean + repair) * math.expm1(seconds / mean)
    assert took.mean() == pytest.approx(expected, abs=4 * took.std() / shards**0.5)
    assert found.redone <= found.failures  # the scorers' node fails too


@pytest.mark.slow
@quick
@given(seconds_of, st.integers(1, 4), st.integers(0, 3), st.integers(0, 10**6))
def test_failures_lose_and_double_nothing(
    seconds: list[list[float]], count: int, places: int, seed: int
) -> None:
    """Samplers and scorers share nodes that fail about once in a shard or two."""
    pools = nodes(count, seconds[0], 0.5), nodes(count, seconds[1])
    found = simulate(*pools, places, Failures(15.0, 2.0, seed))
    # The line ends at as many scorings as shards, so one scored twice would leave another out.
    assert np.isfinite(found.scored_at).all()
    assert found.most_waiting <= places + count  # those that failing scorers gave back
    assert found.seconds >= closed_form_seconds(*pools) - 1e-9
    again = simulate(*pools, places, Failures(15.0, 2.0, seed))
    assert again.scored_at.tolist() == found.scored_at.tolist()


def failing_scorer() -> tuple[int, float]:
    """A seed whose node 0 outlives the test and whose node 1 fails once, and when it does."""
    for seed in range(10_000):
        sampler, scorer, again = np.random.default_rng(seed).exponential(100.0, 3)
        if sampler > 200 and 10 < scorer < 50 and again > 100:
            return seed, scorer
    raise AssertionError("no such seed")


def test_what_a_failure_does() -> None:
    """A scorer dies at its shard: once it is back it scores it, and nothing is drawn again."""
    seed, when = failing_scorer()
    samplers = Pool(((0,),), 0.0, np.array([1.0]))
    scorers = Pool(((1,),), 5.0, np.array([60.0]))
    found = simulate(samplers, scorers, 1, Failures(100.0, 7.0, seed))
    assert (found.failures, found.redone) == (1, 1)
    assert found.seconds == pytest.approx(when + 7 + 5 + 60)
    assert found.sampler_busy * found.seconds == pytest.approx(1)
    assert found.scorer_busy * found.seconds == pytest.approx(when - 5 + 60)


def test_reliable_nodes_change_nothing() -> None:
    rng = np.random.default_rng(0)
    pools = nodes(3, rng.gamma(2, 1, 40)), nodes(2, rng.gamma(2, 1, 40))
    never = simulate(*pools, 2, Failures(1e12, 1.0))
    plain = simulate(*pools, 2)
    assert never.scored_at.tolist() == plain.scored_at.tolist()
    assert never.failures == 0


def test_shards_that_outlast_their_nodes() -> None:
    with pytest.raises(BonbonError, match=r"nodes fail every 0\.0014 hours; make job.shard_size"):
        simulate(nodes(1, [60.0]), nodes(1, [1.0]), 1, Failures(5.0, 1.0))
    # A sampler over four nodes lives a quarter as long.
    wide = Pool(((0, 1, 2, 3),), 0.0, np.array([60.0]))
    with pytest.raises(BonbonError, match=r"make job\.shard_size smaller"):
        simulate(wide, nodes(1, [1.0]), 1, Failures(40.0, 1.0))
    assert simulate(nodes(1, [60.0]), nodes(1, [1.0]), 1, Failures(40.0, 1.0)).seconds > 60


# --- splits ---------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.25, 0.5, 1, 3]))
def test_no_node_gives_more_than_it_has(
    machines: int, per_node: int, gpus: int, scorer: float
) -> None:
    if gpus > per_node or scorer > per_node:
        return
    config = cluster_of(
        cluster={"nodes": machines, "gpus_per_node": per_node},
        sampler__gpus=gpus,
        scorer__gpus=scorer,
    )
    try:
        found = placements(config)
    except BonbonError:
        return
    for samplers, scorers in found:
        for node in range(machines):
            used = gpus * samplers.count((node,)) + scorer * scorers.count((node,))
            assert used <= per_node
            assert per_node - used < scorer  # no further scorer fits
    assert [len(samplers) for samplers, _ in found] == list(range(1, len(found) + 1))


def test_samplers_over_several_nodes() -> None:
    config = cluster_of(cluster={"nodes": 5, "gpus_per_node": 8}, sampler__gpus=16)
    (one, beside_one), (two, beside_two) = placements(config)
    assert one == ((0, 1),)
    assert two == ((0, 1), (2, 3))
    assert {node for nodes in beside_one for node in nodes} == {2, 3, 4}
    assert beside_two == ((4,),) * 8


def test_scorers_on_cpus_leave_all_gpus_to_samplers() -> None:
    config = cluster_of(
        cluster={"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 10},
        scorer={"gpus": 0, "cpus": 4, "completions_per_second": 3},
    )
    ((samplers, scorers),) = placements(config)
    assert (len(samplers), len(scorers)) == (16, 4)


def test_what_has_no_room() -> None:
    with pytest.raises(BonbonError, match=r"no room for a sampler \(8 GPUs\) beside a scorer"):
        placements(cluster_of(sampler__gpus=8))
    with pytest.raises(BonbonError, match="141 GB of weights and a KV cache do not fit 90% of 1 x"):
        work_of(cluster_of(gpu=H100, model=LLAMA_70B))


def test_the_plan_is_the_fastest_split() -> None:
    """Scoring takes 6 of a shard's 32 seconds: about one GPU in five."""
    found = planned(cluster_of(job__prompts=900))
    assert [(split.samplers, split.scorers) for split in found.splits] == [
        (a, 8 - a) for a in range(1, 8)
    ]
    assert found.best == min(found.splits, key=lambda split: split.hours)
    assert found.best.samplers == 6
    hours = [split.closed_form_hours for split in found.splits]
    assert hours[0] == pytest.approx(300 * 26 / 3600)
    assert hours[6] == pytest.approx(300 * 6 / 3600)
    for split in found.splits:
        assert split.closed_form_hours <= split.hours < 1.1 * split.closed_form_hours
        assert split.cost == pytest.approx(split.hours * 8 * 2)
        assert split.bottleneck == ("samplers" if split.samplers < 7 else "scorers")
    assert found.splits[6].sampler_blocked > 0.3
    assert plan_sentences(found)[0].startswith(
        "Both stages at a time: engine.samplers.max: 6, engine.scorers.max: 2: "
    )


def test_one_stage_after_the_other_by_hand() -> None:
    """56 shards in 7 rounds of 8 samplers, and then of 8 scorers; starting takes 5 and 7 s."""
    config = cluster_of(job__prompts=168, sampler__startup_seconds=5, scorer__startup_seconds=7)
    found = planned(config).one_after_other
    assert (found.samplers, found.scorers) == (8, 8)
    assert found.hours == pytest.approx((5 + 7 * 26 + 7 + 7 * 6) / 3600)
    assert found.cost == pytest.approx(found.hours * 8 * 2)


def test_batches_that_are_not_continuous_take_longer() -> None:
    config = cluster_of(
        job__completion_tokens={"mean": 20, "spread": 10}, job__prompts=300, job__shard_size=10
    )
    waits = config.model_copy(
        update={"sampler": config.sampler.model_copy(update={"continuous": False})}
    )
    assert planned(waits).best.hours > 1.2 * planned(config).best.hours


@pytest.mark.slow
def test_of_very_many_splits_some() -> None:
    found = planned(cluster_of(cluster={"nodes": 100}))
    counts = [split.samplers for split in found.splits]
    assert MOST_SPLITS <= len(counts) <= MOST_SPLITS + 1
    assert (counts[0], counts[-1]) == (1, 799)
    # The closed form's best, on no even grid: 350 s of sampling and 80 s of scoring in all.
    assert min(range(1, 800), key=lambda a: max(350 / a, 80 / (800 - a))) in counts


# --- files and the command line -------------------------------------------------------------------

STATED = """
job:
  prompts: 100
  n: 4
  prompt_tokens: {mean: 10}
  completion_tokens: {mean: 20, spread: 5}
cluster: {price_per_gpu_hour: 3}
sampler: {decode_tokens_per_second: 1000, prefill_tokens_per_second: 9000}
scorer: {completions_per_second: 50}
"""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(STATED)
    return path


@pytest.fixture
def pilot(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    groups = [
        group_of(
            f"p{i}",
            prompt_token_ids=(1,) * 30,
            completions=["x"] * 6,
            token_ids=((1,) * 50,) * 6,
            rewards=tuple(rng.normal(size=6)),
        )
        for i in range(8)
    ]
    write_shard(tmp_path / "groups" / "shard-00000.parquet", groups, {})
    return tmp_path / "groups"


def test_the_command(cluster: Path) -> None:
    result = run("--cluster", cluster)
    assert result.exit_code == 0, result.output
    assert re.search(r"100 prompts × 4 completions in 2 shards\s+on 8 GPUs", result.stdout)
    assert "engine.samplers.max: " in result.stdout
    found = json.loads(run("--cluster", cluster, "--json").stdout)
    assert found["best"] in found["splits"]
    assert found["n"] == 4
    assert found["from_pilot"] is None


def test_with_a_pilot(cluster: Path, pilot: Path) -> None:
    """A win rate of 0.9 takes n = 9; lengths are 30 and 50."""
    asked = (pilot, "--win-rate", 0.9, "--max-n", 16, "--cluster", cluster)
    found = json.loads(run(*asked, "--json").stdout)
    assert (found["n"], found["prompt_tokens"], found["completion_tokens"]) == (9, 30, 50)
    assert found["from_pilot"]["wanted"] == 0.9
    assert "n = 9 is the pilot's for a win rate of 0.9 (0.900, 95%" in run(*asked).stdout
    assert plan_from_files(cluster, pilot).n == 4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  n: 4\n", "", "without a pilot's GROUPS, job needs n, prompt_tokens and"),
        ("prompts: 100", "prompts: 0", "job.prompts = 0"),
        ("n: 4", "m: 4", "unknown key job.m"),
        ("decode_tokens_per_second: 1000, ", "", "state decode_tokens_per_second and prefill"),
        ("completions_per_second: 50", "gpus: 1", "scorer: state tokens_per_second or"),
        ("second: 50", "second: 50, tokens_per_second: 5", "not both"),
        ("cluster: {", "train: {gpus: 8}\ncluster: {", "estimates need gpu and model"),
        ("sampler: {", "sampler: {gpus: 12, ", "takes whole ones, a multiple of 8"),
        ("scorer: {", "scorer: {gpus: 9, ", "a scorer must fit a node's 8 GPUs"),
        (STATED, "- 1", "expected the keys job, cluster"),
    ],
)
def test_what_the_file_lacks(cluster: Path, old: str, new: str, said: str) -> None:
    cluster.write_text(STATED.replace(old, new))
    result = run("--cluster", cluster)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert said in result.stderr


@pytest.mark.slow
def test_what_the_command_lacks(cluster: Path, pilot: Path) -> None:
    for arguments, said in (
        ((), "plan needs GROUPS"),
        ((pilot,), "plan needs GROUPS"),
        (("--win-rate", 0.9, "--cluster", cluster), "--win-rate needs GROUPS"),
        ((pilot, "--by", "gold", "--cluster", cluster), "it needs a --win-rate"),
        (("--cluster", cluster, "--plot", "x.png"), "do not go with --cluster"),
        (("--cluster", cluster, "--tokens-per-second", 5), "do not go with --cluster"),
        (("--cluster", cluster.with_name("none.yaml")), "none.yaml"),
        ((pilot, "--win-rate", 0.99, "--max-n", 8, "--cluster", cluster), "no n up to 8 reaches"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert said in result.stderr
    cluster.write_text(STATED.replace("  n: 4\n", ""))
    assert "state job.n, or a --win-rate" in run(pilot, "--cluster", cluster).stderr


def test_no_torch_is_loaded() -> None:
    code = "import bonbon.planning.cluster.tables, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the examples and their arithmetic ------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_follow_their_plan(path: Path) -> None:
    """run.yaml parses, and has the pools that the plan advises for one stage after the other."""
    cluster, config = load_cluster(path), load_config(path.with_name("run.yaml"))
    advised = plan_from_files(path).one_after_other
    engine, sampler = config.engine, config.sampler
    assert engine.name == "ray"
    assert sampler.name == "vllm"
    assert (engine.samplers.max, engine.scorers.max) == (advised.samplers, advised.scorers)
    gpus = sampler.tensor_parallel_size * sampler.pipeline_parallel_size
    assert engine.samplers.num_gpus == gpus == cluster.sampler.gpus
    assert engine.scorers.num_gpus == cluster.scorer.gpus
    assert sampler.engine["max_num_seqs"] == cluster.sampler.rows
    job, sampling = cluster.job, config.sampling
    assert job.completion_tokens is not None
    assert (sampling.n, sampling.shard_size) == (job.n, job.shard_size)
    assert sampling.max_new_tokens == job.completion_tokens.longest
    assert cluster.train is not None
    assert config.train.gradient_checkpointing == cluster.train.gradient_checkpointing
    assert config.train.arguments.max_batch_tokens == cluster.train.pass_tokens


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((REPO / "examples").glob("*/*.yaml"))
        if path.name not in ("run.yaml", "cluster.yaml")
    ],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    found = config_args.load_config_from_file(str(path))
    cluster = load_cluster(path.with_name("cluster.yaml"))
    assert cluster.train is not None
    assert found.num_processes == cluster.train.gpus
    assert found.num_machines * cluster.cluster.gpus_per_node == cluster.train.gpus


@pytest.mark.parametrize(("column", "name"), enumerate(["8b-one-node", "70b-nodes"]))
def test_the_documents_figures_are_computed(column: int, name: str) -> None:
    """What the command prints stands in docs/scaling.md, figure for figure."""
    document = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in document.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    found = plan_from_files(REPO / "examples" / name / "cluster.yaml")
    for estimate in found.estimates:
        assert rows[estimate.name][column] == shown_value(estimate), estimate.name
    after = found.one_after_other
    assert (
        rows["one stage after the other"][column] == f"{after.hours:.2f} hours for {after.cost:.0f}"
    )
    for split in found.splits:
        figures = [split.hours, split.closed_form_hours]
        idle = [split.sampler_idle, split.sampler_blocked, split.scorer_idle]
        texts = [f"{x:.2f}" for x in figures + idle] + [f"{split.cost:.0f}"]
        assert [f"{split.samplers}", f"{split.scorers}", *texts] in lines


@pytest.mark.slow
def test_the_documents_shard_sizes_are_computed() -> None:
    document = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
    config = load_cluster(REPO / "examples" / "8b-one-node" / "cluster.yaml")
    for size in (16, 32, 64, 128, 256):
        job = config.job.model_copy(update={"shard_size": size})
        found = planned(config.model_copy(update={"job": job}))
        assert f"| {size} | {size * 8:,} | {found.best.hours:.2f} |" in document
