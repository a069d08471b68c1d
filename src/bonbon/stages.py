"""What the stages share: loading what a configuration names, and working through shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config import ModelConfig, PromptsConfig, RewardConfig, RunConfig
from bonbon.digests import weights_digest
from bonbon.errors import BonbonError
from bonbon.groups import (
    Group,
    Groups,
    read_shard,
    shard_indices,
    shard_path,
    shard_provenance,
    shard_rows,
    write_shard,
)
from bonbon.models import load_policy
from bonbon.progress import progress_bar
from bonbon.prompts import EncodedPrompt, PromptRow, hold_out, read_prompts
from bonbon.reward import FunctionReward, Reward, RewardModel, WeightedSum
from bonbon.run_folder import NEUTRAL
from bonbon.sampling import TransformersSampler

# --- what the configuration names -----------------------------------------------------------------


def build_reward(config: RewardConfig) -> Reward:
    """The reward that a configuration describes. Raises BonbonError when it cannot be loaded."""
    if config.sum:
        return WeightedSum(tuple((part.weight, build_reward(part)) for part in config.sum))
    if config.function:
        return FunctionReward.from_name(config.function)
    assert config.model is not None
    return RewardModel.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_batch_tokens=config.max_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def described(settings: RewardConfig) -> dict[str, Any]:
    """A reward's settings as plain values, defaults left out."""
    return settings.model_dump(mode="json", exclude_defaults=True)


def reward_identity(settings: RewardConfig) -> dict[str, Any]:
    """What tells one reward from another: its settings, its function's file, its model's weights.

    A function's file alone: what it imports may change without being noticed. Raises BonbonError
    when the function cannot be imported.
    """
    identity = described(settings)
    if settings.sum:
        identity["sum"] = [reward_identity(part) for part in settings.sum]
    elif settings.function:
        identity["code"] = FunctionReward.from_name(settings.function).digest()
    else:
        identity["weights"] = weights_digest(Path(str(settings.model)).expanduser())
    for neutral in NEUTRAL:
        identity.pop(neutral, None)
    return identity


def evaluation_prompts(config: RunConfig) -> list[PromptRow]:
    """The prompts to evaluate on alone."""
    if config.evaluation.prompts is not None:
        return read_configured(config.evaluation.prompts)
    return load_prompts(config)[1]


def load_prompts(config: RunConfig) -> tuple[list[PromptRow], list[PromptRow]]:
    """The prompts to train on and those to evaluate on."""
    training = read_configured(config.prompts)
    if config.evaluation.prompts is not None:
        return training, read_configured(config.evaluation.prompts)
    kept, held = hold_out(training, config.evaluation.holdout)
    if not kept or not held:
        raise BonbonError(
            f"{config.prompts.path}: {len(training)} prompts are too few to hold out "
            f"{config.evaluation.holdout:.0%} for the evaluation; set evaluation.prompts"
        )
    return kept, held


def read_configured(prompts: PromptsConfig) -> list[PromptRow]:
    """The prompts of a configured file. Raises BonbonError as `read_prompts` does."""
    return read_prompts(
        prompts.path, prompts.column, prompts.id_column, prompts.split, prompts.limit
    )


def load_model(model: ModelConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model and the tokenizer that the settings name. Raises BonbonError."""
    return load_policy(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )


# --- working through shards -----------------------------------------------------------------------


def sample_shards(
    sampler: TransformersSampler,
    prompts: Sequence[EncodedPrompt],
    folder: Path,
    model: ModelConfig,
    title: str,
) -> None:
    """Draw the shards that `folder` lacks."""
    size = sampler.config.shard_size
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    todo = [index for index in range(len(shards)) if not shard_path(folder, index).exists()]
    if not todo:
        return
    provenance = {
        "model": model.name,
        "revision": model.revision,
        "sampling": sampler.config.model_dump(mode="json"),
        "dtype": str(sampler.model.dtype).removeprefix("torch."),
    }
    total = sum(len(shards[index]) for index in todo) * sampler.config.n
    with progress_bar(title, total, "completions") as bar:
        for index in todo:
            began = time.monotonic()
            groups = sampler.sample(shards[index], progress=bar.tokens)
            spent = {
                "tokens": sum(sum(group.lengths()) for group in groups),
                "seconds": time.monotonic() - began,
            }
            write_shard(shard_path(folder, index), groups, provenance | spent)
            bar.advance(sum(group.n for group in groups))


def transform_shards(
    source: Path,
    target: Path,
    transform: Callable[[Groups], list[Group]],
    provenance: dict[str, Any],
    title: str,
) -> None:
    """Write the transformed groups of every shard of `source` that `target` lacks."""
    todo = [i for i in shard_indices(source) if not shard_path(target, i).exists()]
    if not todo:
        return
    total = sum(shard_rows(shard_path(source, index)) for index in todo)
    with progress_bar(title, total, "prompts") as bar:
        for index in todo:
            shard = read_shard(shard_path(source, index))
            began = time.monotonic()
            groups = transform(shard)
            spent = {"seconds": time.monotonic() - began}
            write_shard(shard_path(target, index), groups, shard.provenance | provenance | spent)
            bar.advance(len(groups))


def spent(folder: Path, what: str) -> float | None:
    """The `seconds` or `tokens` that the shards of a folder took; None where they do not say."""
    noted = [shard_provenance(shard_path(folder, i)).get(what) for i in shard_indices(folder)]
    found = [value for value in noted if value is not None]
    return sum(found) if found and len(found) == len(noted) else None
