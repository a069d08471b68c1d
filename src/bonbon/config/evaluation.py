"""Settings of the evaluation: prompts, metrics, judge, lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import PromptsConfig
from bonbon.config.settings import Settings

# What the evaluation measures anyway (`evaluation.drift`, which a test holds equal).
OWN_METRICS = frozenset(
    {
        "length", "characters", "repetition", "refusal", "truncation", "empty",
        "distinct_1", "distinct_2", "self_bleu",
    }
)  # fmt: skip


_BAD_NAME = "is taken or not made of letters, digits, '-' and '_'"


def _is_name(text: str) -> bool:
    return text.replace("-", "").replace("_", "").isalnum()


def is_policy_name(text: str) -> bool:
    """Whether the evaluation can call a policy so: it keeps what it draws in folders of endings."""
    return _is_name(text) and not text.endswith(("-prompts", "-samples", "-forward"))


class JudgeConfig(Settings):
    """A judge model behind an OpenAI-compatible endpoint."""

    model: str = Field(description="the name that the endpoint knows it by")
    base_url: str = Field("http://127.0.0.1:8000/v1", description="up to /chat/completions")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key, if one is set"
    )
    pairs: int = Field(1, ge=1, description="pairs a prompt, each judged in both orders")
    criteria: str = Field(
        "Which answer is more helpful, accurate and better written?",
        description="what the judge is asked to decide by",
    )
    max_tokens: int = Field(512, ge=1, description="of the judge's reply")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="more fields of the request; null leaves one out, as in "
        "{max_tokens: null, max_completion_tokens: 2000}",
    )
    timeout: float = Field(60.0, gt=0, description="seconds that a request may take")
    retries: int = Field(10, ge=0, description="of a request, with growing pauses up to a minute")
    concurrency: int = Field(8, ge=1, description="requests at a time")

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

    path: Path
    column: str = "text"
    limit: int | None = Field(None, ge=1)


class LMEvalConfig(Settings):
    """Tasks of lm-evaluation-harness, run on the base model and on every trained one."""

    tasks: list[str] = Field(min_length=1)
    include_path: Path | None = Field(None, description="a folder with tasks of your own")
    num_fewshot: int | None = Field(None, ge=0, description="None: as each task says")
    limit: int | None = Field(None, ge=1, description="examples a task; for trials only")
    batch_size: int = Field(8, ge=1)


class EvaluationConfig(Settings):
    """Measuring on held-out prompts."""

    prompts: PromptsConfig | None = Field(None, description="else `holdout` of the prompts")
    holdout: float = Field(0.2, gt=0, lt=1, description="held out when there are no own prompts")
    k: int = Field(8, ge=1, description="completions a prompt from each model")
    seed: int = 1
    rewards: dict[str, RewardConfig] = Field(
        default_factory=dict, description="further rewards, never trained on (a gold reward)"
    )
    metrics: dict[str, str] = Field(
        default_factory=dict, description="off-target metrics, each a package.module:function"
    )
    human_text: TextsConfig | None = Field(
        None, description="texts by people, whose perplexity shows what was forgotten"
    )
    judge: JudgeConfig | None = None
    lm_eval: LMEvalConfig | None = None
    max_batch_tokens: int | None = Field(None, ge=1, description="of the KL; None: by the device")
    bootstrap: int = Field(2000, ge=100, description="resamples for the 95% intervals")

    @model_validator(mode="after")
    def _column_names(self) -> Self:
        for key, names in (("rewards", self.rewards), ("metrics", self.metrics)):
            for name in names:
                # Our own columns, and what the report shows beside them.
                taken = name.startswith("kl") or name in ("reward", "tokens")
                if taken or not _is_name(name):
                    raise ValueError(f"{key}: {name!r} {_BAD_NAME}")
        own = sorted(self.metrics.keys() & OWN_METRICS)
        if own:
            raise ValueError(f"metrics: {own[0]!r} is measured anyway; call yours something else")
        both = sorted(self.rewards.keys() & self.metrics.keys())
        if both:
            raise ValueError(f"{both[0]!r} is both in rewards and in metrics; rename one")
        return self
