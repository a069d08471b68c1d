"""The settings of `bonbon generate`: a run's settings for decoding, and a strategy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator

from bonbon.config.reward import RewardConfig
from bonbon.config.run import RunConfig
from bonbon.config.sampling import ModelConfig, PromptsConfig, SamplingConfig
from bonbon.config.settings import Settings, parse_settings
from bonbon.decoding.catalogue import describe_strategy, parse_strategy, strategy_name
from bonbon.decoding.strategy import Strategy
from bonbon.system.errors import BonbonError

DEFAULT_STRATEGY = "best_of_n"
FUNCTION_NAME = r"[\w.]+:\w+"  # package.module:function

# A strategy as a setting: a name, or `{name: NAME, setting: value, …}`.
StrategySetting = Annotated[
    Strategy, PlainValidator(parse_strategy), PlainSerializer(describe_strategy)
]


class GenerateConfig(Settings):
    """All settings of `bonbon generate`."""

    model: ModelConfig
    prompts: PromptsConfig | None = Field(None, description="a file of prompts")
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig | None = Field(None, description="None: only for strategies that vote")
    strategy: StrategySetting = Field(DEFAULT_STRATEGY, validate_default=True)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end a completion where they first appear"
    )


def parse_generate_config(
    values: Any, overrides: Sequence[str] = (), source: str = "the command line"
) -> GenerateConfig:
    """Return checked settings; sections that only a run has (`train` and so on) are ignored.

    Raises BonbonError naming the wrong key or value and what was expected.
    """
    values = without_run_sections(values, GenerateConfig)
    if isinstance(values, dict) and "model" not in values:
        raise BonbonError(f"{source}: there is no model; name one with --model")
    config = parse_settings(GenerateConfig, values, overrides, source)
    check_strategy_has_reward(config.strategy, config.reward)
    return config


def without_run_sections(values: Any, kind: type[Settings]) -> Any:
    """Return plain values without the sections that only a run has."""
    if not isinstance(values, dict):
        return values
    others = RunConfig.model_fields.keys() - kind.model_fields.keys()
    return {key: value for key, value in values.items() if key not in others}


def check_strategy_has_reward(strategy: Strategy, reward: RewardConfig | None) -> None:
    """Raise BonbonError for a strategy that chooses by a reward and has none."""
    if strategy.needs_reward and reward is None:
        raise BonbonError(
            f"strategy {strategy_name(strategy)} chooses by a reward; name one with --reward, or "
            "as `reward` in the configuration"
        )


def with_named(
    values: Any,
    options: Mapping[str, Any],
    *,
    reward: str | None = None,
    strategy: str | None = None,
) -> Any:
    """Return plain settings, overridden by the options of a command.

    `options` maps `section.key` to a value; None leaves the setting unchanged. A `reward` replaces
    the whole section, and so does a `strategy` of another name. In the settings, `model` or
    `reward` may be just a name.
    """
    if not isinstance(values, dict):
        return values
    changed = dict(values)
    if isinstance(changed.get("model"), str):
        changed["model"] = {"name": changed["model"]}
    reward = reward or (changed["reward"] if isinstance(changed.get("reward"), str) else None)
    if reward is not None:
        changed["reward"] = named_reward(reward).model_dump(exclude_defaults=True)
    current = changed.get("strategy") or DEFAULT_STRATEGY
    current = (
        {"name": current} if isinstance(current, str) else current
    )  # --set reaches its settings
    other = isinstance(current, dict) and strategy not in (None, current.get("name"))
    changed["strategy"] = {"name": strategy} if other else current
    for option, value in options.items():
        section, _, key = option.rpartition(".")
        if value is not None:
            inner = changed.get(section)
            new = {**(inner if isinstance(inner, dict) else {}), key: value}
            changed |= {section: new} if section else {key: value}
    return changed


def named_reward(name: str) -> RewardConfig:
    """Return the settings of a reward: a `package.module:function`, or else a reward model."""
    if re.fullmatch(FUNCTION_NAME, name):
        return RewardConfig(function=name)
    return RewardConfig(model=name)
