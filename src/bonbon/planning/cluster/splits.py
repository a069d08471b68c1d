"""Splits of the GPUs between samplers and scorers: all are simulated, the fastest is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from bonbon.planning.cluster import on_paper
from bonbon.planning.cluster.config import ClusterConfig, TrainingConfig, load_cluster
from bonbon.planning.cluster.on_paper import Accelerator, Method, ModelShape
from bonbon.planning.cluster.simulation import (
    Failures,
    Pool,
    closed_form_seconds,
    simulate,
    stage_seconds,
)
from bonbon.planning.cluster.workload import (
    DrawLengths,
    Work,
    fitting_rows,
    pilot_lengths,
    sampler_speed,
    scorer_tokens_per_second,
    shard_work,
    stated_lengths,
)
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.planning.which_n import Plan

MOST_SPLITS = 64  # of more, this many evenly spaced ones and the closed form's best
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Split:
    """A split of the GPUs between samplers and scorers.

    Idle is the fraction of a stage's time without work, blocked and start-up time included. The
    cost is that of all GPUs of the cluster.
    """

    samplers: int
    scorers: int
    hours: float
    closed_form_hours: float
    sampler_idle: float
    sampler_blocked: float
    scorer_idle: float
    bottleneck: str
    cost: float
    failures: int
    redone: int


@dataclass(frozen=True)
class OneAfterOther:
    """The plan without a split: all GPUs sample, then all score; without failures."""

    samplers: int
    scorers: int
    hours: float
    cost: float


@dataclass(frozen=True)
class Estimate:
    """An estimated figure."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster's simulated splits, the fastest one, the plan without a split, and estimates."""

    prompts: int
    n: int
    shards: int
    prompt_tokens: float
    completion_tokens: float
    gpus: int
    splits: tuple[Split, ...]
    best: Split
    one_after_other: OneAfterOther
    estimates: tuple[Estimate, ...]
    from_pilot: Plan | None = None


Nodes = tuple[tuple[int, ...], ...]


def placements(config: ClusterConfig) -> list[tuple[Nodes, Nodes]]:
    """List the nodes of 1, 2, … samplers, and of the scorers that fit on the remaining GPUs.

    Samplers fill node after node. Scorers without GPUs take CPUs, and all GPUs sample. Raises
    BonbonError where no split has one of each.
    """
    most = len(_sampler_nodes(config, config.cluster.gpus // config.sampler.gpus))
    counts = range(most if config.scorer.gpus == 0 else 1, most + 1)
    placed = []
    for count in counts:
        samplers = _sampler_nodes(config, count)
        scorers = _scorer_nodes(config, samplers)
        if samplers and scorers:
            placed.append((samplers, scorers))
    if not placed:
        raise BonbonError(
            f"{config.cluster.nodes} nodes have no room for a sampler ({config.sampler.gpus} GPUs) "
            f"beside a scorer ({config.scorer.gpus:g} GPUs, or {config.scorer.cpus:g} CPUs without "
            "one); add nodes, or make them smaller"
        )
    return placed


def _sampler_nodes(config: ClusterConfig, count: int) -> Nodes:
    """Return the nodes of the first `count` samplers, or of as many as fit."""
    node, gpus = config.cluster.gpus_per_node, config.sampler.gpus
    if gpus > node:
        span = gpus // node
        starts = range(0, config.cluster.nodes - span + 1, span)
        return tuple(tuple(range(start, start + span)) for start in starts)[:count]
    return tuple((k,) for k in range(config.cluster.nodes) for _ in range(node // gpus))[:count]


def _scorer_nodes(config: ClusterConfig, samplers: Nodes) -> Nodes:
    cluster, scorer = config.cluster, config.scorer
    if scorer.gpus == 0:
        room = [cluster.cpus_per_node / scorer.cpus] * cluster.nodes
    else:
        each = min(config.sampler.gpus, cluster.gpus_per_node)
        taken = np.array([k for nodes in samplers for k in nodes], dtype=np.int64)
        used = np.bincount(taken, minlength=cluster.nodes) * each
        room = ((cluster.gpus_per_node - used) / scorer.gpus).tolist()
    fitting = [math.floor(places + _ROUNDING) for places in room]
    return tuple((k,) for k, count in enumerate(fitting) for _ in range(count))


def _pools(config: ClusterConfig, work: Work, placed: tuple[Nodes, Nodes]) -> tuple[Pool, Pool]:
    return (
        Pool(placed[0], config.sampler.startup_seconds, work.sample_seconds),
        Pool(placed[1], config.scorer.startup_seconds, work.score_seconds),
    )


def _split(config: ClusterConfig, pools: tuple[Pool, Pool]) -> Split:
    cluster = config.cluster
    failures = None
    if cluster.mtbf_hours:
        failures = Failures(cluster.mtbf_hours * 3600, cluster.repair_seconds, config.job.seed)
    places = config.job.waiting_shards
    simulated = simulate(*pools, 2 * len(pools[1].nodes) if places is None else places, failures)
    hours = simulated.seconds / 3600
    return Split(
        samplers=len(pools[0].nodes),
        scorers=len(pools[1].nodes),
        hours=hours,
        closed_form_hours=closed_form_seconds(*pools) / 3600,
        sampler_idle=1 - simulated.sampler_busy,
        sampler_blocked=simulated.sampler_blocked,
        scorer_idle=1 - simulated.scorer_busy,
        bottleneck="samplers" if simulated.sampler_busy >= simulated.scorer_busy else "scorers",
        cost=hours * cluster.gpus * cluster.price_per_gpu_hour,
        failures=simulated.failures,
        redone=simulated.redone,
    )


def _one_after_other(config: ClusterConfig, work: Work) -> OneAfterOther:
    cluster = config.cluster
    most = _sampler_nodes(config, cluster.gpus // config.sampler.gpus), _scorer_nodes(config, ())
    pools = _pools(config, work, most)
    hours = sum(map(stage_seconds, pools)) / 3600
    return OneAfterOther(
        samplers=len(most[0]),
        scorers=len(most[1]),
        hours=hours,
        cost=hours * cluster.gpus * cluster.price_per_gpu_hour,
    )


def plan_cluster(config: ClusterConfig, draw: DrawLengths, n: int) -> ClusterPlan:
    """Simulate the splits of the cluster's GPUs between samplers and scorers.

    All splits; of more than 64, evenly spaced ones and the one that the closed form prefers.
    Raises BonbonError where the model, or a sampler beside a scorer, does not fit.
    """
    work = shard_work(config, draw, n)
    pools = [_pools(config, work, placed) for placed in placements(config)]
    shown = set(np.linspace(0, len(pools) - 1, min(len(pools), MOST_SPLITS)).astype(int).tolist())
    shown.add(min(range(len(pools)), key=lambda i: closed_form_seconds(*pools[i])))
    splits = tuple(_split(config, pools[i]) for i in sorted(shown))
    best = min(splits, key=lambda split: split.hours)
    return ClusterPlan(
        prompts=config.job.prompts,
        n=n,
        shards=len(work.sample_seconds),
        prompt_tokens=work.prompt_tokens,
        completion_tokens=work.completion_tokens,
        gpus=config.cluster.gpus,
        splits=splits,
        best=best,
        one_after_other=_one_after_other(config, work),
        estimates=tuple(estimates(config, work)),
    )


def plan_from_files(
    path: Path,
    groups: Path | None = None,
    win_rate: float | None = None,
    by: str | None = None,
    max_n: int = 1024,
) -> ClusterPlan:
    """Plan a cluster from a YAML file, with the lengths of a pilot's groups if given.

    With a wanted win rate as well, n is the estimate of `which_n.plan`. Raises BonbonError for
    settings that the file lacks without a pilot, and where no n reaches the win rate.
    """
    config = load_cluster(path)
    if by is not None and win_rate is None:
        raise BonbonError("--by says which reward decides a win; it needs a --win-rate")
    if groups is None:
        if win_rate is not None:
            raise BonbonError("--win-rate needs GROUPS, a pilot from which n is chosen")
        return plan_cluster(config, *_stated(config, path))
    from bonbon.groups.shards import read_groups
    from bonbon.planning.which_n import plan

    pilot = read_groups(groups)
    planned = None if win_rate is None else plan(pilot, win_rate, by, max_n)
    n = config.job.n if planned is None else _planned_n(planned)
    if n is None:
        raise BonbonError(f"{path}: state job.n, or a --win-rate for which GROUPS gives n")
    return replace(plan_cluster(config, pilot_lengths(pilot, n), n), from_pilot=planned)


def _stated(config: ClusterConfig, path: Path) -> tuple[DrawLengths, int]:
    job = config.job
    if job.n is None or job.prompt_tokens is None or job.completion_tokens is None:
        raise BonbonError(
            f"{path}: without a pilot's GROUPS, job needs n, prompt_tokens and completion_tokens"
        )
    return stated_lengths(job.prompt_tokens, job.completion_tokens, job.n), job.n


def _planned_n(planned: Plan) -> int:
    if planned.by_estimate is None:
        raise BonbonError(
            f"no n up to {planned.largest_n:,} reaches a win rate of {planned.wanted:g} in the "
            "pilot; ask for less, or state job.n and leave --win-rate out"
        )
    return planned.by_estimate.n


# --- on paper -------------------------------------------------------------------------------------


def estimates(config: ClusterConfig, work: Work) -> Iterator[Estimate]:
    """Yield estimates of memory, speed, hours and cost, as far as the configuration allows."""
    if config.gpu and config.model:
        yield from _sampler_estimates(config, config.gpu, config.model, work)
    sampling = float(work.sample_seconds.sum()) * config.sampler.gpus / 3600
    scoring = float(work.score_seconds.sum()) * config.scorer.gpus / 3600
    yield Estimate("tokens drawn", work.n * config.job.prompts * work.completion_tokens / 1e6, "M")
    yield Estimate("sampling", sampling, "GPU hours")
    speed = scorer_tokens_per_second(config)
    if speed is not None:
        yield Estimate("tokens scored a second, a scorer", speed, "tokens/s")
    yield Estimate("tokens scored", work.scored_tokens / 1e6, "M")
    yield Estimate("scoring", scoring, "GPU hours")
    if config.train and config.gpu and config.model:
        yield from _training_estimates(config, config.train, config.gpu, config.model, work)


def _sampler_estimates(
    config: ClusterConfig, gpu: Accelerator, model: ModelShape, work: Work
) -> Iterator[Estimate]:
    sampler = config.sampler
    lengths = (work.prompt_tokens, work.completion_tokens)
    speed, rows, prefill = sampler_speed(config, *lengths, work.n)
    context = lengths[0] + lengths[1] / 2
    floor = on_paper.decode_speed(model, gpu, sampler.gpus, rows, context)
    yield Estimate("parameters", on_paper.parameter_count(model) / 1e9, "billion")
    yield Estimate("weights in bfloat16", on_paper.weight_bytes(model) / 1e9, "GB")
    yield Estimate("KV cache of a token", on_paper.kv_bytes_per_token(model) / 1e3, "kB")
    yield Estimate("rows whose KV cache fits a sampler", fitting_rows(config, sum(lengths)), "rows")
    yield Estimate("rows decoded together", rows, "rows")
    yield Estimate("a decoding step, the floor", floor.step_seconds(rows) * 1e3, "ms")
    yield Estimate(
        "tokens drawn a second, a sampler, the ceiling", floor.tokens_per_second(rows), "tokens/s"
    )
    yield Estimate("the same, as planned", speed.tokens_per_second(rows), "tokens/s")
    yield Estimate("tokens prefilled a second, a sampler", prefill, "tokens/s")


def _training_estimates(
    config: ClusterConfig, train: TrainingConfig, gpu: Accelerator, model: ModelShape, work: Work
) -> Iterator[Estimate]:
    tokens = work.total_tokens * train.epochs
    flops = on_paper.training_flops(model, tokens, train.method, train.gradient_checkpointing)
    reference_flops = on_paper.forward_flops(model, work.total_tokens)
    states = {
        method: on_paper.training_state_bytes(model, method, train.r) / 1e9
        for method in get_args(Method)
    }
    hours = on_paper.hours_at(flops, gpu, train.gpus, train.utilisation)
    recomputing = on_paper.hours_at(reference_flops, gpu, train.gpus, train.utilisation)
    price = config.cluster.price_per_gpu_hour
    for method, size in states.items():
        yield Estimate(f"weights, gradients, optimiser: {method}", size, "GB")
    yield Estimate(f"a GPU's share: {train.method}", states[train.method] / train.gpus, "GB")
    if train.gradient_checkpointing:
        kept = on_paper.checkpoint_bytes(model, train.pass_tokens)
        yield Estimate("training: checkpoints of a pass, a GPU", kept / 1e9, "GB")
    yield Estimate("FLOPs of the training", flops / 1e18, "· 10^18")
    yield Estimate("training", hours, "hours")
    yield Estimate("log-probabilities recomputed", recomputing, "hours")
    yield Estimate("cost of these two", (hours + recomputing) * train.gpus * price, "")
