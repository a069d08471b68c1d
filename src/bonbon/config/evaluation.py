"""Settings of the evaluation: prompts, metrics, judge, lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from bonbon.config.fields import Neutral
from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import PromptsConfig
from bonbon.config.settings import Settings

_BAD_NAME = "is taken or not made of letters, digits, '-' and '_'"


def _is_name(text: str) -> bool:
    return text.replace("-", "").replace("_", "").isalnum()


def is_policy_name(text: str) -> bool:
    """Return whether a policy can have this name: its folders add endings to it."""
    return _is_name(text) and not text.endswith(("-prompts", "-samples", "-forward"))


class JudgeClientSettings(Settings):
    """Timeouts and retries of the judge's client."""

    timeout: float = Field(60.0, gt=0, description="Seconds that a request may take.")
    retries: int = Field(
        10, ge=0, description="Further tries of a request that failed, with growing pauses."
    )


class JudgeConfig(Settings):
    """A judge model behind an OpenAI-compatible endpoint."""

    model: str = Field(description="The endpoint's name for the model.")
    base_url: Neutral[str] = Field(
        "http://127.0.0.1:8000/v1", description="The address, up to /chat/completions."
    )
    api_key_env: Neutral[str] = Field(
        "OPENAI_API_KEY", description="The environment variable that holds the key, if one is set."
    )
    pairs: int = Field(1, ge=1, description="Pairs of each prompt, each judged in both orders.")
    criteria: str = Field(
        "Which answer is more helpful, accurate and better written?",
        description="What the judge is asked to decide by.",
    )
    max_tokens: int = Field(512, ge=1, description="The longest reply, in tokens.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="More fields of the request; null leaves one out, as in "
        "{max_tokens: null, max_completion_tokens: 2000}.",
    )
    concurrency: Neutral[int] = Field(8, ge=1, description="Requests at a time.")
    client: Neutral[JudgeClientSettings] = Field(
        JudgeClientSettings(), description="Timeouts and retries of requests."
    )

    @model_validator(mode="after")
    def _extra_can_be_sent(self) -> Self:
        for name in sorted(self.extra.keys() & {"messages", "model", "stream"}):
            raise ValueError(
                f"extra: {name!r} cannot be set there; `model` names the model, and `criteria` is "
                "what you can say in the message"
            )
        try:
            json.dumps(self.extra, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"extra cannot be written as JSON ({error}); use texts, finite numbers, true, "
                "false, null, and lists and mappings of them"
            ) from error
        return self


class TextsConfig(Settings):
    """A file of texts, each in a row: JSONL, CSV, Parquet or text."""

    path: Path = Field(description="The file.")
    column: str = Field("text", description="The column that holds the texts.")
    limit: int | None = Field(None, ge=1, description="Keep only so many rows. None: all.")


class LMEvalConfig(Settings):
    """Tasks of lm-evaluation-harness, run on the base model and on every trained one."""

    tasks: list[str] = Field(min_length=1, description="The names of the tasks.")
    include_path: Path | None = Field(None, description="A folder with tasks of your own.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in front of each question. None: as each task says."
    )
    limit: int | None = Field(
        None, ge=1, description="Questions of each task, for trials only. None: all."
    )
    batch_size: int = Field(8, ge=1, description="Questions in a batch.")


class EvaluationConfig(Settings):
    """Measuring on held-out prompts."""

    prompts: PromptsConfig | None = Field(
        None, description="A file of held-out prompts. None: the share `holdout` of the prompts."
    )
    holdout: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the prompts that is held out when there is no `prompts`.",
    )
    k: int = Field(8, ge=1, description="Completions of each prompt, from each model.")
    seed: int = Field(1, description="Seed of the evaluation's draws.")
    rewards: dict[str, RewardConfig] = Field(
        default_factory=dict,
        description="Further rewards by name, never trained on, such as a gold reward.",
    )
    metrics: dict[str, str] = Field(
        default_factory=dict,
        description="Off-target metrics by name, each a package.module:function.",
    )
    human_text: TextsConfig | None = Field(
        None, description="Texts by people, whose perplexity shows what the model forgot."
    )
    judge: JudgeConfig | None = Field(None, description="A judge model that compares completions.")
    lm_eval: LMEvalConfig | None = Field(
        None, description="Tasks of lm-evaluation-harness that every model is measured on."
    )
    max_batch_tokens: Neutral[int | None] = Field(
        None, ge=1, description="Most tokens in a pass that measures the KL. None: by the device."
    )
    bootstrap: int = Field(2000, ge=100, description="Resamples behind each 95% interval.")

    @model_validator(mode="after")
    def _column_names(self) -> Self:
        for key, names in (("rewards", self.rewards), ("metrics", self.metrics)):
            for name in names:
                # Our own columns, and what the report shows beside them.
                taken = name.startswith("kl") or name in ("reward", "tokens")
                if taken or not _is_name(name):
                    raise ValueError(f"{key}: {name!r} {_BAD_NAME}")
        both = sorted(self.rewards.keys() & self.metrics.keys())
        if both:
            raise ValueError(f"{both[0]!r} is both in rewards and in metrics; rename one")
        return self
