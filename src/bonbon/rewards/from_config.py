"""Build the reward that a configuration describes, and tell rewards apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bonbon.config.reward import RewardConfig, RewardServerConfig
from bonbon.config.settings import without_neutral
from bonbon.groups.group import Prompt
from bonbon.models.loading import load_tokenizer
from bonbon.rewards.model import RewardModel, reward_inputs
from bonbon.rewards.reward import FunctionReward, Reward, WeightedSum
from bonbon.system.digests import weights_digest


def build_reward(config: RewardConfig) -> Reward:
    """The reward that a configuration describes. Raises BonbonError when it cannot be loaded."""
    if config.sum:
        return WeightedSum(tuple((part.weight, build_reward(part)) for part in config.sum))
    if config.function:
        return FunctionReward.from_name(config.function)
    if config.server is not None:
        from bonbon.rewards.openai import OpenAIReward

        return OpenAIReward(config.server, _server_encoding(config.server))
    assert config.model is not None
    if config.vllm is not None:
        from bonbon.rewards.vllm import VllmRewardModel

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
    return without_neutral(identity, RewardConfig)
