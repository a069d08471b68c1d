"""The work of a job: lengths of prompts and completions, and the seconds of each shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bonbon.groups.group import Group
from bonbon.planning.cluster import on_paper
from bonbon.planning.cluster.config import ClusterConfig, JobConfig, LengthsConfig
from bonbon.planning.cluster.on_paper import Accelerator, DecodeSpeed, ModelShape
from bonbon.system.errors import BonbonError

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]  # lengths; sums are int64

_CHUNK = 1024  # shards whose lengths are held at once

# Maps a generator and a number of prompts to the lengths of prompts (prompts,) and completions
# (prompts, n).
DrawLengths = Callable[[np.random.Generator, int], tuple[Ints, Ints]]


@dataclass(frozen=True)
class Work:
    """The seconds of one sampler and one scorer for each shard, (shards,), and mean lengths.

    `total_tokens` counts the prompt once a completion, `scored_tokens` as often as scorers read it.
    """

    sample_seconds: Floats
    score_seconds: Floats
    prompt_tokens: float
    completion_tokens: float
    total_tokens: float
    scored_tokens: float
    n: int


def stated_lengths(prompt: LengthsConfig, completion: LengthsConfig, n: int) -> DrawLengths:
    """Return a sampler of lengths from their stated distributions, all independent."""

    def draw(rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        return _lengths(rng, prompt, (count,)), _lengths(rng, completion, (count, n))

    return draw


def _lengths(rng: np.random.Generator, stated: LengthsConfig, size: tuple[int, ...]) -> Ints:
    if stated.spread:
        shape = (stated.mean / stated.spread) ** 2
        drawn = rng.gamma(shape, stated.mean / shape, size)
    else:
        drawn = np.full(size, stated.mean)
    return np.clip(np.rint(drawn), 1, stated.longest).astype(np.int32)


def pilot_lengths(groups: Sequence[Group], n: int) -> DrawLengths:
    """Return a sampler of a pilot's lengths: prompts, and n completions each, with replacement."""
    prompts = np.array([max(1, len(group.prompt_token_ids)) for group in groups], dtype=np.int32)
    draws = min(group.n for group in groups)
    completions = np.array([group.lengths()[:draws] for group in groups], dtype=np.int32)

    def draw(rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        which = rng.integers(len(prompts), size=count)
        drawn = completions[which[:, None], rng.integers(draws, size=(count, n))]
        return prompts[which], np.maximum(drawn, 1)

    return draw


def decode_steps(lengths: Ints, rows: int, continuous: bool = True) -> Ints:
    """Count the decoding steps of each shard, (shards,), from lengths (shards, completions).

    `rows` rows are decoded together. With continuous batching the next row starts as soon as one
    ends; otherwise the next `rows` rows start when the longest of the current ones ends.
    """
    count = lengths.shape[1]
    if not continuous:
        batches = np.pad(lengths, ((0, 0), (0, -count % rows)))
        return batches.reshape(len(lengths), -1, rows).max(axis=2).sum(axis=1)
    ends = lengths[:, :rows].copy()  # the step at which each place is free again
    shards = np.arange(len(lengths))
    for k in range(rows, count):
        ends[shards, ends.argmin(axis=1)] += lengths[:, k]
    return ends.max(axis=1)


def shard_work(config: ClusterConfig, draw: DrawLengths, n: int) -> Work:
    """Compute the seconds of every shard: decoding, prefill of each prompt once, and scoring."""
    job = config.job
    parts = list(_drawn_shards(job, draw, n))
    prompts, completions = (sum(float(part[i].sum()) for part in parts) for i in (0, 1))
    mean_prompt, mean_completion = prompts / job.prompts, completions / job.prompts / n
    speed, rows, prefill = sampler_speed(config, mean_prompt, mean_completion, n)
    sampling = [
        speed.fixed * decode_steps(drawn, rows, config.sampler.continuous)
        + speed.per_row * drawn.sum(axis=1)
        + read.sum(axis=1) / prefill
        for read, drawn in parts
    ]
    scoring = [_score_seconds(config, read, drawn, n) for read, drawn in parts]
    return Work(
        sample_seconds=np.concatenate(sampling),
        score_seconds=np.concatenate(scoring),
        prompt_tokens=mean_prompt,
        completion_tokens=mean_completion,
        total_tokens=n * prompts + completions,
        scored_tokens=sum(float(scored_tokens(config, *part, n).sum()) for part in parts),
        n=n,
    )


def _drawn_shards(job: JobConfig, draw: DrawLengths, n: int) -> Iterator[tuple[Ints, Ints]]:
    """Draw lengths of prompts (shards, shard_size) and completions (shards, shard_size · n).

    The last shard is filled up with length 0.
    """
    rng = np.random.default_rng(job.seed)
    most = _CHUNK * job.shard_size
    for start in range(0, job.prompts, most):
        count = min(most, job.prompts - start)
        lacking = -count % job.shard_size
        prompts, completions = draw(rng, count)
        yield (
            np.pad(prompts, (0, lacking)).reshape(-1, job.shard_size),
            np.pad(completions, ((0, lacking), (0, 0))).reshape(-1, job.shard_size * n),
        )


def sampler_speed(
    config: ClusterConfig, prompt_tokens: float, completion_tokens: float, n: int
) -> tuple[DecodeSpeed, int, float]:
    """Return a sampler's decoding speed, rows decoded together, and prefill tokens a second.

    A stated speed holds for steps of `rows` rows; a step of fewer rows takes as long. Raises
    BonbonError where the model does not fit its GPUs.
    """
    sampler, gpu, model = config.sampler, config.gpu, config.model
    rows = min(sampler.rows, config.job.shard_size * n)
    if gpu and model:
        rows = min(rows, fitting_rows(config, prompt_tokens + completion_tokens))
    if sampler.decode_tokens_per_second:
        speed = DecodeSpeed(sampler.rows / sampler.decode_tokens_per_second, 0.0)
    else:
        gpu, model = described(config)
        context = prompt_tokens + completion_tokens / 2
        speed = on_paper.decode_speed(model, gpu, sampler.gpus, rows, context, sampler.utilisation)
    prefill = sampler.prefill_tokens_per_second
    if prefill is None:
        gpu, model = described(config)
        used = sampler.prefill_utilisation
        prefill = on_paper.forward_tokens_per_second(model, gpu, sampler.gpus, used)
    return speed, rows, prefill


def described(config: ClusterConfig) -> tuple[Accelerator, ModelShape]:
    """Return the GPU and the model of a configuration that was checked to describe them."""
    assert config.gpu is not None
    assert config.model is not None
    return config.gpu, config.model


def fitting_rows(config: ClusterConfig, tokens: float) -> int:
    """Return how many rows of `tokens` tokens fit a sampler. Raises BonbonError for none."""
    gpu, model = described(config)
    fit = on_paper.rows_that_fit(model, gpu, config.sampler.gpus, tokens)
    if fit < 1:
        weights = on_paper.weight_bytes(model) / 1e9
        raise BonbonError(
            f"sampler.gpus: {weights:.0f} GB of weights and a KV cache do not fit 90% of "
            f"{config.sampler.gpus} x {gpu.memory_gb:g} GB; give a sampler more GPUs"
        )
    return fit


def scorer_tokens_per_second(config: ClusterConfig) -> float | None:
    """Return a scorer's tokens a second; None where completions a second are stated."""
    scorer = config.scorer
    if scorer.completions_per_second or scorer.tokens_per_second:
        return scorer.tokens_per_second
    assert config.gpu is not None  # the configuration was checked
    assert config.reward_model is not None
    return on_paper.forward_tokens_per_second(
        config.reward_model, config.gpu, scorer.gpus, scorer.utilisation
    )


def _score_seconds(config: ClusterConfig, prompts: Ints, completions: Ints, n: int) -> Floats:
    speed = scorer_tokens_per_second(config)
    if speed is None:
        assert config.scorer.completions_per_second is not None
        return (completions > 0).sum(axis=1) / config.scorer.completions_per_second
    return scored_tokens(config, prompts, completions, n) / speed


def scored_tokens(config: ClusterConfig, prompts: Ints, completions: Ints, n: int) -> Ints:
    """Count the tokens that scoring reads of each shard, (shards,)."""
    reads = 1 if config.scorer.shared_prompt else n
    return reads * prompts.sum(axis=1) + completions.sum(axis=1)
