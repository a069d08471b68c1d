"""Build the reward that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bonbon.config.reward import RewardConfig, RewardServerConfig
from bonbon.groups.group import Prompt
from bonbon.models.loading import load_tokenizer
from bonbon.rewards.model import RewardModel, reward_inputs
from bonbon.rewards.reward import FunctionReward, Reward, WeightedSum


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


def check_functions(config: RewardConfig) -> None:
    """Import the functions that a reward names. Raises BonbonError for one that is not there."""
    for part in config.sum or ():
        check_functions(part)
    if config.function:
        FunctionReward.from_name(config.function)


def close_reward(reward: Reward) -> None:
    """Let go of what a reward holds beside memory: an engine, its processes, its connections."""
    for _, part in getattr(reward, "parts", ()):
        close_reward(part)
    if hasattr(reward, "close"):
        reward.close()
