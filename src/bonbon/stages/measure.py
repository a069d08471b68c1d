"""Draws of policies on held-out prompts, and their measurements.

A policy's draws are in `evaluation/NAME-samples/` and never change. The groups in
`evaluation/NAME/` add the measured columns: rewards, metrics, KLs. Each shard records the settings
of its columns. A column that is missing, or was computed with other settings, is computed from the
draws, so a new metric or reward needs no new sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.reward import RewardConfig
from bonbon.config.run import RunConfig
from bonbon.config.sampling import (
    ModelConfig,
    SamplerConfig,
    SamplingConfig,
    TransformersSamplerConfig,
)
from bonbon.evaluation.group_values import KL_METRICS
from bonbon.evaluation.human_text import TextLosses, human_text_losses, read_texts
from bonbon.evaluation.kl import completion_kls, vocabulary_size
from bonbon.evaluation.results import Draws
from bonbon.groups.group import Group
from bonbon.groups.prompts import PromptRow
from bonbon.groups.shards import (
    read_groups,
    read_shard,
    shard_indices,
    shard_path,
    shard_paths,
    shard_provenance,
    write_shard,
)
from bonbon.rewards.from_config import check_functions, opened_reward
from bonbon.rewards.identity import reward_identity, reward_provenance, same_reward
from bonbon.rewards.reward import Reward, score_groups
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import Progress, ShardWork, prompt_count, work_through, write_prompts
from bonbon.runs.work import drawing
from bonbon.sampling.from_config import load_model, opened_sampler, sampler_provenance
from bonbon.system.atomic_files import read_json, write_json
from bonbon.system.digests import file_digest
from bonbon.system.progress import progress_bar

BASE = "base"
Loader = Callable[[], tuple[PreTrainedModel, Tokenizer]]


@dataclass(frozen=True)
class Policy:
    """A model, its sampling settings, and the number of draws of which it keeps the best."""

    name: str
    model: ModelConfig
    sampling: SamplingConfig
    best_of: int = 1


@dataclass(frozen=True)
class MeasuredColumn:
    """A measured column of groups, computed again when its `settings` (plain values) change."""

    settings: Mapping[str, Any]
    compute: Callable[[list[Group]], list[Group]]

    def is_of(self, settings: Mapping[str, Any] | None) -> bool:
        """Return whether a column that was computed with these settings is this one."""
        return settings is not None and same_reward(settings, self.settings)


@dataclass(frozen=True)
class Measured:
    """A policy's draws and measurements; None for those that were not asked for."""

    draws: Draws
    losses: TextLosses | None
    tasks: list[dict[str, Any]] | None


def measure_policies(
    folder: RunFolder, policies: Sequence[Policy], rows: Sequence[PromptRow]
) -> dict[str, Measured]:
    """Draw from and measure policies, the base model first; it stays loaded for the KLs.

    Resumes after a stop, and loads a model only if draws or measurements are missing. Raises
    BonbonError when a model, a reward or a metric fails.
    """
    if _has_engines(folder.config):
        _measure_by_engines(folder, policies, rows)
    with ExitStack() as stack:
        return _measure_in_turn(folder, policies, rows, _rewards(folder.config, stack))


def _has_engines(config: RunConfig) -> bool:
    """Return whether sampling or scoring starts an engine that needs the accelerator for itself."""
    rewards = [config.reward, *config.evaluation.rewards.values()]
    return _sampler(config).name != "transformers" or any(map(_has_engine, rewards))


def _has_engine(reward: RewardConfig) -> bool:
    return reward.vllm is not None or any(map(_has_engine, reward.sum or ()))


def _measure_by_engines(
    folder: RunFolder, policies: Sequence[Policy], rows: Sequence[PromptRow]
) -> None:
    """Draw and score for every policy before any model is loaded beside an engine."""
    for policy in policies:
        _draw(folder, policy, partial(load_model, policy.model), rows)
    with ExitStack() as stack:
        rewards = _rewards(folder.config, stack)
        for policy in policies:
            _measure(folder, policy.name, rewards)


def _measure_in_turn(
    folder: RunFolder,
    policies: Sequence[Policy],
    rows: Sequence[PromptRow],
    rewards: Mapping[str, MeasuredColumn],
) -> dict[str, Measured]:
    load_base = cache(partial(load_model, policies[0].model))
    loaders = {policies[0].model: load_base}
    measured = {}
    for policy in policies:
        if policy.model not in loaders:  # the previous model is released
            loaders = {
                policies[0].model: load_base,
                policy.model: cache(partial(load_model, policy.model)),
            }
        measured[policy.name] = _measured(
            folder, policy, loaders[policy.model], load_base, rows, rewards
        )
    return measured


def _measured(
    folder: RunFolder,
    policy: Policy,
    load: Loader,
    load_base: Loader,
    rows: Sequence[PromptRow],
    rewards: Mapping[str, MeasuredColumn],
) -> Measured:
    _draw(folder, policy, load, rows)
    if policy.name == BASE:
        _measure(folder, BASE, rewards)
    else:
        kl = _kl_column(folder.config, policy, load, load_base)
        _measure(folder, policy.name, {**rewards, "kl": kl})
    if policy.best_of > 1:  # human text and tasks are measured for its model alone
        return Measured(_draws(folder, policy), None, None)
    if policy.name != BASE:
        _measure_forward(folder, policy, load, load_base)
    return Measured(
        _draws(folder, policy),
        _text_losses(folder, policy.name, load),
        _tasks(folder, policy.name, load),
    )


# --- drawing and measuring ------------------------------------------------------------------------


def drawn_folder(folder: RunFolder, name: str) -> Path:
    """Return the folder of a policy's draws."""
    return folder.evaluation / f"{name}-samples"


def _draw(folder: RunFolder, policy: Policy, load: Loader, rows: Sequence[PromptRow]) -> None:
    target, stage = drawn_folder(folder, policy.name), f"draw-{policy.name}"
    if folder.notes.is_finished(stage, target):
        return
    config = folder.config
    k = config.evaluation.k
    # Enough for best-of-n against a further draw; more than best_of, to average over subsets.
    draws = k + config.target_n if policy.name == BASE else k + policy.best_of - 1
    settings = policy.sampling.model_copy(update={"n": draws, "seed": config.evaluation.seed})
    prompts = folder.evaluation / f"{policy.name}-prompts"
    # Each model has its own stream: draws with the same random numbers would be correlated.
    stream = policy.name
    with opened_sampler(_sampler(config), policy.model, settings, stream, load) as sampler:
        write_prompts(sampler.encode(rows), prompts, settings.shard_size)
        noted = sampler_provenance(sampler, policy.model)
        work = ShardWork(prompts, target, drawing(sampler), noted)
        work_through(work, f"{policy.name}: sampling")
    folder.notes.finish(stage, len(shard_paths(target)))


def _sampler(config: RunConfig) -> SamplerConfig:
    """Return the run's sampler, or the local one: no server has the trained models."""
    return TransformersSamplerConfig() if config.sampler.name == "openai" else config.sampler


def _rewards(config: RunConfig, stack: ExitStack) -> dict[str, MeasuredColumn]:
    """Return the columns of every policy: the reward, further rewards, the user's metrics.

    Rewards are loaded at first use, and closed with the stack.
    """

    def opened(reward: RewardConfig) -> Reward:
        return stack.enter_context(opened_reward(reward))

    def scored(load: Callable[[], Reward], name: str, groups: list[Group]) -> list[Group]:
        pairs = zip(groups, score_groups(load(), groups), strict=True)
        return [g.with_metric(name, s) if name else g.with_rewards(s) for g, s in pairs]

    evaluation = config.evaluation
    metrics = {name: RewardConfig(function=it) for name, it in evaluation.metrics.items()}
    rewards = {"": config.reward, **evaluation.rewards, **metrics}
    for reward in rewards.values():
        check_functions(reward)
    return {
        name: MeasuredColumn(
            reward_identity(reward), partial(scored, cache(partial(opened, reward)), name)
        )
        for name, reward in rewards.items()
    }


def _kl_column(
    config: RunConfig, policy: Policy, load: Loader, load_base: Loader
) -> MeasuredColumn:
    own, base = _kl_sampling(config, policy)

    def measured(groups: list[Group]) -> list[Group]:
        return _with_kls(groups, config, (load, own), (load_base, base))

    settings = {"policy": own.model_dump(mode="json"), "base": base.model_dump(mode="json")}
    return MeasuredColumn(settings, measured)


def _kl_sampling(config: RunConfig, policy: Policy) -> tuple[SamplingConfig, SamplingConfig]:
    """Return the sampling settings of policy and base that define the KL.

    With top-k or top-p on the base, the KL of the truncated distributions can be infinite. Then the
    KL is that of the models at their temperatures, along draws of the truncated policy.
    """
    keys = {"temperature"} if config.sampling.truncates else {"temperature", "top_p", "top_k"}
    own, base = policy.sampling, config.sampling
    return SamplingConfig(**own.model_dump(include=keys)), SamplingConfig(
        **base.model_dump(include=keys)
    )


def _with_kls(
    groups: Sequence[Group],
    config: RunConfig,
    drawn_from: tuple[Loader, SamplingConfig],
    other: tuple[Loader, SamplingConfig],
) -> list[Group]:
    """Add the KLs from the policy that drew the groups; nothing if the vocabularies differ."""
    (model, tokenizer), (reference, reference_tokenizer) = drawn_from[0](), other[0]()
    drawn = (token for group in groups for ids in group.token_ids for token in ids)
    largest = max(drawn, default=0)
    if tokenizer.get_vocab() != reference_tokenizer.get_vocab() or largest >= min(
        vocabulary_size(model), vocabulary_size(reference)
    ):
        return list(groups)
    kls = completion_kls(
        model,
        reference,
        groups,
        sampling=drawn_from[1],
        base_sampling=other[1],
        max_batch_tokens=config.evaluation.max_batch_tokens,
    )
    # On draws of truncated policies, estimates from the drawn tokens alone are biased.
    names = ["rao_blackwellised"] if config.sampling.truncates else list(KL_METRICS)
    with_kls = list(groups)
    for estimate, name in ((name, KL_METRICS[name]) for name in names):
        with_kls = [
            group.with_metric(name, getattr(kl, estimate))
            for group, kl in zip(with_kls, kls, strict=True)
        ]
    return with_kls


def _measure(folder: RunFolder, name: str, columns: Mapping[str, MeasuredColumn]) -> None:
    """Compute the columns that the shards of `evaluation/NAME/` lack."""
    source, target = drawn_folder(folder, name), folder.evaluation / name
    todo = {
        index: missing
        for index in shard_indices(source)
        if (missing := _missing(shard_path(target, index), columns))
    }
    if not todo:
        return
    with progress_bar(f"{name}: measuring", prompt_count(source, list(todo)), "prompts") as bar:
        for index, missing in todo.items():
            path = shard_path(target, index)
            shard = read_shard(path if path.exists() else shard_path(source, index))
            began = time.monotonic()
            groups = [_with_only(group, columns) for group in shard]
            for column in missing:
                groups = columns[column].compute(groups)
            before = shard.provenance if path.exists() else {}
            kept = {"kl": before["columns"]["kl"]} if "kl" in before.get("columns", {}) else {}
            asked = {key: dict(column.settings) for key, column in columns.items()}
            provenance = shard.provenance | {
                "columns": kept | asked,
                "reward": reward_provenance(folder.config.reward),
                "seconds": before.get("seconds", 0.0) + time.monotonic() - began,
            }
            write_shard(path, groups, provenance)
            bar.advance(len(groups))


def _with_only(group: Group, columns: Mapping[str, MeasuredColumn]) -> Group:
    """Drop metrics that are no longer asked for."""
    wanted = {*columns, *KL_METRICS.values()}
    kept = {name: values for name, values in group.metrics.items() if name in wanted}
    return replace(group, metrics=kept)


def _missing(path: Path, columns: Mapping[str, MeasuredColumn]) -> list[str]:
    known = shard_provenance(path).get("columns", {}) if path.exists() else {}
    return [name for name, column in columns.items() if not column.is_of(known.get(name))]


def _measure_forward(folder: RunFolder, policy: Policy, load: Loader, load_base: Loader) -> None:
    """Measure KL(base ‖ policy) along the base's first k draws, into `evaluation/NAME-forward/`."""
    config = folder.config
    own, base = _kl_sampling(config, policy)

    def measured(groups: Sequence[Group], _: Progress) -> list[Group]:
        heads = [group.part(0, config.evaluation.k) for group in groups]
        return _with_kls(heads, config, (load_base, base), (load, own))

    work = ShardWork(folder.evaluation / BASE, _forward(folder, policy.name), measured, {})
    work_through(work, f"{policy.name}: measuring forward")


def _forward(folder: RunFolder, name: str) -> Path:
    return folder.evaluation / f"{name}-forward"


def _draws(folder: RunFolder, policy: Policy) -> Draws:
    groups = read_groups(folder.evaluation / policy.name)
    forward = _forward(folder, policy.name)
    has_forward = forward.exists() and "kl" in groups[0].metrics
    return Draws(groups, policy.best_of, read_groups(forward) if has_forward else None)


# --- human text and tasks -------------------------------------------------------------------------


def _text_losses(folder: RunFolder, name: str, load: Loader) -> TextLosses | None:
    source = folder.config.evaluation.human_text
    if source is None:
        return None
    settings = source.model_dump(mode="json") | {"content": file_digest(source.path)}

    def measured() -> dict[str, list[float]]:
        texts = read_texts(source.path, source.column, source.limit)
        losses = human_text_losses(*load(), texts, folder.config.evaluation.max_batch_tokens)
        return {name: values.tolist() for name, values in vars(losses).items()}

    losses = _kept(folder.evaluation / f"{name}-human-text.json", settings, measured)
    return TextLosses(**{key: np.array(values) for key, values in losses.items()})


def _tasks(folder: RunFolder, name: str, load: Loader) -> list[dict[str, Any]] | None:
    lm_eval = folder.config.evaluation.lm_eval
    if lm_eval is None:
        return None

    def measured() -> list[dict[str, Any]]:
        from bonbon.evaluation.lm_eval import run_tasks

        return [result.to_json() for result in run_tasks(lm_eval, *load())]

    settings = lm_eval.model_dump(mode="json", exclude={"batch_size"})
    if lm_eval.include_path is not None:
        files = sorted(lm_eval.include_path.rglob("*.yaml"))
        settings["content"] = [file_digest(path) for path in files]
    return list(_kept(folder.evaluation / f"{name}-tasks.json", settings, measured))


def _kept(path: Path, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """Return the values kept in `path` for these settings; otherwise measure and keep them."""
    record = read_json(path) if path.exists() else {}
    if record.get("settings") != settings:
        record = {"settings": settings, "found": measure()}
        write_json(path, record)
    return record["found"]
