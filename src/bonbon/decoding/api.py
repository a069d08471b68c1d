"""`generate`: answers prompts by a decoding strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.catalogue import parse_strategy, strategy_name
from bonbon.decoding.config import named_reward
from bonbon.decoding.source import LocalSource
from bonbon.decoding.strategy import Generation, Strategy
from bonbon.groups.group import Prompt
from bonbon.groups.prompts import PromptRow, checked_prompt
from bonbon.models.loading import load_policy
from bonbon.rewards.from_config import build_reward
from bonbon.rewards.reward import Reward


def generate(
    prompts: Sequence[Prompt | PromptRow],
    model: str | PreTrainedModel,
    reward: str | Reward | None = None,
    strategy: str | Strategy = "best_of_n",
    *,
    sampling: SamplingConfig | None = None,
    processing_class: Tokenizer | None = None,
    stop: str | Sequence[str] = (),
    progress: Callable[[int], Any] | None = None,
) -> list[Generation]:
    """Answer each prompt by a strategy.

    Args:
        prompts: plain texts, lists of {"role", "content"} messages (for the chat template), or
            `PromptRow`s. A prompt's draws depend on its id, not on other prompts; the default id is
            its position (`row-1`, `row-2`, …). Prompts too long for the model are an error, unless
            `sampling.on_long_prompt` says otherwise: skipped ones have no generation.
        model: a folder or hub id, or a model in evaluation mode with its `processing_class`.
        reward: a function from (prompts, completions) to numbers, a reward model's folder or hub
            id, or `package.module:function`. Strategies that vote need none.
        strategy: a name, or settings such as `SpeculativeRejection(alpha=0.5)`.
        sampling: how completions are drawn; a strategy may draw `sampling.n` candidates.
        stop: strings that end a completion where they first appear.
        progress: called with the number of tokens of each step.

    Raises BonbonError for prompts that do not fit, a model or reward that cannot be loaded, and
    rewards that are not finite; ValueError for an unknown strategy or a reward that is missing.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list; put a single prompt into a list")
    chosen = parse_strategy(strategy)
    if chosen.needs_reward and reward is None:
        raise ValueError(f"strategy {strategy_name(chosen)} chooses by a reward; pass one")
    if isinstance(model, str):
        model, loaded = load_policy(model)
        processing_class = processing_class or loaded
    if processing_class is None:
        raise ValueError("a loaded model needs its tokenizer; pass it as processing_class")
    if isinstance(reward, str):
        reward = build_reward(named_reward(reward))
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ValueError("an empty stop string would end every completion at once")
    source = LocalSource(model, processing_class, sampling or SamplingConfig(), stops, progress)
    return chosen.generate(source.encode(_rows(prompts)), source, reward)


def _rows(prompts: Sequence[Prompt | PromptRow]) -> list[PromptRow]:
    rows = [
        prompt if isinstance(prompt, PromptRow) else PromptRow(f"row-{number}", prompt)
        for number, prompt in enumerate(prompts, start=1)
    ]
    seen: set[str] = set()
    for row in rows:
        checked_prompt(row.prompt, f"prompt {row.prompt_id}")
        if row.prompt_id in seen:
            raise ValueError(f"prompt_id {row.prompt_id!r} occurs twice; its draws would be equal")
        seen.add(row.prompt_id)
    return rows
