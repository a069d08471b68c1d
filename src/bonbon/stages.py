"""What the stages share: loading what a configuration names, and working through shards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.ahead import in_turn
from bonbon.config import (
    ModelConfig,
    OpenAISamplerConfig,
    PromptsConfig,
    RewardConfig,
    RewardServerConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    VllmSamplerConfig,
)
from bonbon.digests import weights_digest
from bonbon.errors import BonbonError
from bonbon.groups import (
    Group,
    Groups,
    Prompt,
    iter_provenance,
    read_shard,
    shard_indices,
    shard_path,
    shard_rows,
    write_shard,
)
from bonbon.models import load_policy, load_tokenizer
from bonbon.progress import progress_bar
from bonbon.prompts import EncodedPrompt, PromptRow, is_held_out, iter_prompts
from bonbon.reward import (
    FunctionReward,
    Reward,
    RewardModel,
    WeightedSum,
    reward_inputs,
    score_groups,
)
from bonbon.run_folder import NEUTRAL, RunFolder
from bonbon.sampling import Sampler, TransformersSampler
from bonbon.storage import remove_file

# --- what the configuration names -----------------------------------------------------------------


def build_reward(config: RewardConfig) -> Reward:
    """The reward that a configuration describes. Raises BonbonError when it cannot be loaded."""
    if config.sum:
        return WeightedSum(tuple((part.weight, build_reward(part)) for part in config.sum))
    if config.function:
        return FunctionReward.from_name(config.function)
    if config.server is not None:
        from bonbon.remote.reward import OpenAIReward

        return OpenAIReward(config.server, _server_encoding(config.server))
    assert config.model is not None
    if config.vllm is not None:
        from bonbon.vllm_engine import VllmRewardModel

        return VllmRewardModel(config, config.vllm)
    return RewardModel.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_batch_tokens=config.max_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def _server_encoding(server: RewardServerConfig) -> Callable[[Prompt, str], list[int]] | None:
    """The token ids that the server's model is to read, where its tokenizer is named."""
    if server.tokenizer is None:
        return None
    tokenizer, context = load_tokenizer(server.tokenizer)

    def encode(prompt: Prompt, completion: str) -> list[int]:
        return reward_inputs(tokenizer, prompt, completion, context, types=False)["input_ids"]

    return encode


@contextmanager
def opened_reward(config: RewardConfig) -> Iterator[Reward]:
    """`build_reward`; its engines and connections are let go of at the end."""
    reward = build_reward(config)
    try:
        yield reward
    finally:
        close_reward(reward)


def close_reward(reward: Reward) -> None:
    """Let go of what a reward holds beside memory: an engine, its processes, its connections."""
    for _, part in getattr(reward, "parts", ()):
        close_reward(part)
    if hasattr(reward, "close"):
        reward.close()


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
    elif settings.server:
        identity["server"]["model"] = settings.server.model or settings.server.base_url
    elif settings.model:
        identity["weights"] = weights_digest(Path(str(settings.model)).expanduser())
    return without_neutral(identity)


def without_neutral(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings without those that cannot change a result, at any depth."""
    return {
        key: without_neutral(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in NEUTRAL
    }


def evaluation_prompts(config: RunConfig) -> list[PromptRow]:
    """The prompts to evaluate on. Raises BonbonError as `iter_prompts` does."""
    if config.evaluation.prompts is not None:
        return read_configured(config.evaluation.prompts)
    return [row for row, is_held in _divided(config) if is_held]


def training_prompts(config: RunConfig) -> Iterator[PromptRow]:
    """The prompts to train on, one in memory at a time. Raises BonbonError as `iter_prompts`."""
    if config.evaluation.prompts is not None:
        yield from _rows(config.prompts)
    else:
        yield from (row for row, is_held in _divided(config) if not is_held)


def _divided(config: RunConfig) -> Iterator[tuple[PromptRow, bool]]:
    """All prompts, each with whether it is held out for the evaluation."""
    counts = {True: 0, False: 0}
    for row in _rows(config.prompts):
        is_held = is_held_out(row, config.evaluation.holdout)
        counts[is_held] += 1
        yield row, is_held
    if 0 in counts.values():
        raise BonbonError(
            f"{config.prompts.path}: {sum(counts.values())} prompts are too few to hold out "
            f"{config.evaluation.holdout:.0%} for the evaluation; set evaluation.prompts"
        )


def trained_on(config: RunConfig, among: Collection[str]) -> set[str]:
    """Those of some prompts, each as JSON, that the training prompts have too."""
    told = (json.dumps(row.prompt) for row in training_prompts(config))
    return {prompt for prompt in told if prompt in among}


def read_configured(prompts: PromptsConfig) -> list[PromptRow]:
    """The prompts of a configured file. Raises BonbonError as `iter_prompts` does."""
    return list(_rows(prompts))


def _rows(prompts: PromptsConfig) -> Iterator[PromptRow]:
    return iter_prompts(
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


@contextmanager
def opened_sampler(
    settings: SamplerConfig,
    model: ModelConfig,
    sampling: SamplingConfig,
    stream: str = "",
    load: Callable[[], tuple[PreTrainedModel, Tokenizer]] | None = None,
) -> Iterator[Sampler]:
    """The sampler that a configuration describes, closed at the end.

    `load` gives the model where it is loaded already. Raises BonbonError when it cannot be used.
    """
    sampler = _sampler(settings, model, sampling, stream, load or partial(load_model, model))
    try:
        yield sampler
    finally:
        sampler.close()


def _sampler(
    settings: SamplerConfig,
    model: ModelConfig,
    sampling: SamplingConfig,
    stream: str,
    load: Callable[[], tuple[PreTrainedModel, Tokenizer]],
) -> Sampler:
    if isinstance(settings, VllmSamplerConfig):
        from bonbon.vllm_engine import VllmSampler

        return VllmSampler(model, sampling, settings, stream)
    if isinstance(settings, OpenAISamplerConfig):
        from bonbon.remote.sampler import OpenAISampler

        tokenizer, context = load_tokenizer(**_named(model))
        return OpenAISampler(tokenizer, sampling, settings, stream, context)
    return TransformersSampler(*load(), sampling, stream)


def named_tokenizer(model: ModelConfig, sampler: SamplerConfig) -> tuple[Tokenizer, int | None]:
    """A model's tokenizer, and the context that is left where this sampler draws.

    The model's weights are not read. Raises BonbonError.
    """
    tokenizer, context = load_tokenizer(**_named(model))
    known = [context]
    if isinstance(sampler, VllmSamplerConfig):
        known.append(sampler.max_model_len)
    elif isinstance(sampler, OpenAISamplerConfig):
        from bonbon.remote.sampler import server_context

        known.append(server_context(sampler))
    return tokenizer, min((length for length in known if length is not None), default=None)


def _named(model: ModelConfig) -> dict[str, Any]:
    return model.model_dump(include={"name", "revision", "trust_remote_code"})


# --- working through shards -----------------------------------------------------------------------

Progress = Callable[[int], Any]  # called with the number of tokens that were drawn
Transform = Callable[[Sequence[Group], Progress], list[Group]]


@dataclass(frozen=True)
class ShardWork:
    """What a stage makes of a shard: the groups of `source`, transformed, into `target`.

    Whoever calls it, in whichever process and order: a shard's output depends on the shard alone.
    `provenance` is what `target` notes beside what `source` does.
    """

    source: Path
    target: Path
    transform: Transform
    provenance: Mapping[str, Any]

    def todo(self) -> list[int]:
        """The shards that `source` has and `target` lacks."""
        done = set(shard_indices(self.target))
        return [index for index in shard_indices(self.source) if index not in done]

    def read(self, index: int) -> Groups:
        """A shard of `source`."""
        return read_shard(shard_path(self.source, index))

    def make(self, groups: Groups, progress: Progress = lambda _: None) -> Groups:
        """The groups transformed, with the tokens and the seconds noted."""
        began = time.monotonic()
        made = self.transform(groups, progress) if len(groups) else []
        spent = {
            "tokens": sum(sum(group.lengths()) for group in made),
            "seconds": time.monotonic() - began,
        }
        return Groups(made, groups.provenance | dict(self.provenance) | spent)

    def write(self, index: int, groups: Groups) -> None:
        """A shard of `target`, whole or not at all."""
        write_shard(shard_path(self.target, index), groups, groups.provenance)


def prompt_count(source: Path, todo: Sequence[int]) -> int:
    """The prompts of these shards, all of one size but the last.

    Two are opened and not all, which in a store would take longer than the first shard's work.
    """
    if not todo:
        return 0
    first, last = (shard_rows(shard_path(source, index)) for index in (todo[0], todo[-1]))
    return first * (len(todo) - 1) + last


def work_through(work: ShardWork, title: str) -> None:
    """Do what is left, shard by shard, under a progress bar."""
    todo = work.todo()
    if not todo:
        return
    with progress_bar(title, prompt_count(work.source, todo), "prompts") as bar:
        for index in todo:
            made = work.make(work.read(index), bar.tokens)
            work.write(index, made)
            bar.advance(len(made))


# --- sampling -------------------------------------------------------------------------------------


def write_prompts(prompts: Iterable[EncodedPrompt], folder: Path, size: int) -> int:
    """Prompts as groups that have no completions yet, `size` a shard; how many shards.

    The folder then holds these alone: what an earlier call left there is written over or removed.
    """
    upcoming = iter(prompts)
    chunks = iter(lambda: [prompt.as_group() for prompt in islice(upcoming, size)], [])

    def write(numbered: tuple[int, list[Group]]) -> None:
        index, groups = numbered
        write_shard(shard_path(folder, index), groups, {})

    count = sum(1 for _ in in_turn(write, enumerate(chunks)))
    for index in shard_indices(folder):
        if index >= count:
            remove_file(shard_path(folder, index))
    return count


def drawing(sampler: Sampler) -> Transform:
    """A transform that draws the completions of groups that have none."""

    def drawn(groups: Sequence[Group], progress: Progress) -> list[Group]:
        return sampler.sample([EncodedPrompt.of(group) for group in groups], progress)

    return drawn


def drawn_by(sampler: Sampler, model: ModelConfig) -> dict[str, Any]:
    """What the groups of a sampler note of it."""
    return {
        "model": model.name,
        "revision": model.revision,
        "sampling": sampler.config.model_dump(mode="json"),
        **sampler.described(),
    }


# --- scoring --------------------------------------------------------------------------------------


def scoring(reward: Reward) -> Transform:
    """A transform that scores groups."""

    def scored(groups: Sequence[Group], _: Progress) -> list[Group]:
        scores = score_groups(reward, groups)
        return [group.with_rewards(s) for group, s in zip(groups, scores, strict=True)]

    return scored


# --- the stages of a run --------------------------------------------------------------------------


@contextmanager
def opened_work(folder: RunFolder, stage: str) -> Iterator[ShardWork]:
    """The work of the stage `sample` or `score`, with its model loaded.

    Raises BonbonError when the model or the reward cannot be loaded.
    """
    config = folder.config
    if stage == "sample":
        with opened_sampler(config.sampler, config.model, config.sampling) as sampler:
            noted = drawn_by(sampler, config.model)
            yield ShardWork(*folder.ways(stage), drawing(sampler), noted)
    else:
        noted = {"reward": described(config.reward)}
        with opened_reward(config.reward) as reward:
            yield ShardWork(*folder.ways(stage), scoring(reward), noted)


def work_here(folder: RunFolder, stage: str) -> None:
    """Do a stage in this process."""
    with opened_work(folder, stage) as work:
        work_through(work, {"sample": "sampling", "score": "scoring"}[stage])


def spent(folders: Iterable[Path]) -> dict[str, float | None]:
    """The `tokens` and `seconds` that folders' shards took; None where one does not say."""
    noted = [note for folder in folders for note in list(iter_provenance(folder)) or [{}]]
    return {what: _total([note.get(what) for note in noted]) for what in ("tokens", "seconds")}


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
