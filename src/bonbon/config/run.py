"""The configuration of a run, read from YAML and changed with `--set key=value`.

Relative paths are taken from the current folder. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from bonbon.config.engine import EngineConfig, LocalEngineConfig
from bonbon.config.evaluation import _BAD_NAME, EvaluationConfig, is_policy_name
from bonbon.config.renamed import upgraded
from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import (
    ModelConfig,
    PromptsConfig,
    SamplerConfig,
    SamplingConfig,
    TransformersSamplerConfig,
)
from bonbon.config.settings import Settings, parse_settings, read_yaml
from bonbon.config.training import TrainConfig


class RunConfig(Settings):
    """Everything that defines a run."""

    model: ModelConfig = Field(description="The base model.")
    prompts: PromptsConfig = Field(description="The prompts.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="How completions are drawn.")
    sampler: SamplerConfig = Field(
        TransformersSamplerConfig(), description="What draws completions."
    )
    reward: RewardConfig = Field(description="The reward that completions are ranked by.")
    engine: EngineConfig = Field(
        LocalEngineConfig(), description="Where completions are drawn and scored."
    )
    storage: str | None = Field(
        None,
        min_length=1,
        description="Where samples and groups are kept: a folder or s3://…, gs://…, hdfs://…. "
        "None: the run's folder.",
    )
    rounds: int = Field(
        1,
        ge=1,
        description="How often to sample, score and train, each time from the last round's model.",
    )
    train: TrainConfig = Field(TrainConfig(), description="The training.")
    baselines: dict[str, TrainConfig] = Field(
        default_factory=dict,
        description="Further trainings by name, measured beside the main one.",
    )
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(), description="Measuring on held-out prompts."
    )

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.sampling.n < 2:
            raise ValueError(
                "sampling.n: best-of-n against worst needs n >= 2; with n = 1 nothing is chosen"
            )
        if self.model.device == "balanced" and self.sampler.name != "vllm":
            raise ValueError(
                "model.device: balanced spreads a model to measure it; what draws from one that "
                "is spread is sampler: vllm with tensor_parallel_size"
            )
        taken = {"base", f"best-of-{self.target_n}", self.model_name}
        for name in self.baselines:
            if name in taken or not is_policy_name(name):
                raise ValueError(f"baselines: {name!r} {_BAD_NAME}")
        return self

    @model_validator(mode="after")
    def _rounds_compose(self) -> Self:
        if self.rounds == 1:
            return self
        if self.train.lora is not None and not self.train.lora.merge:
            raise ValueError(
                "rounds start from the last round's whole weights; set train.lora.merge to true"
            )
        if self.train.kl_budget is not None:
            raise ValueError(
                "train.kl_budget would hold for each of the rounds and not for all of them; leave "
                "it out, or set rounds to 1"
            )
        if self.sampler.name == "openai":
            raise ValueError(
                "a round draws from the last one's model, which no server has; set sampler to "
                "transformers or vllm"
            )
        if self.train.tilt == "optimal":
            raise ValueError(
                "rounds compose for best-of-n (a best-of-a of a best-of-b) and not for the optimal "
                "tilt; leave train.tilt out"
            )
        return self

    @property
    def target_n(self) -> int:
        """The n of the best-of-n that models are measured beside: train.n, rounded up.

        The evaluation draws as many of each prompt, and k more, from the base model.
        """
        return max(2, math.ceil(self.train.n or self.sampling.n))

    @property
    def model_name(self) -> str:
        """The name of the trained model in tables: its objective."""
        return self.train.objective

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Every model to train, the main one last."""
        return {**self.baselines, self.model_name: self.train}


def round_config(config: RunConfig, number: int, base: Path | str) -> RunConfig:
    """The configuration of one of `rounds`, which starts from the model `base`.

    A best-of-a of a best-of-b is a best-of-ab, so each of k rounds aims at n^(1/k). The baselines
    belong to the first round.
    """
    n = (config.train.n or config.sampling.n) ** (1 / config.rounds)
    whole = round(n)
    n = whole if abs(n - whole) < 1e-9 else n  # 8^(1/3) is not 2 in floating point
    tilt = config.train.tilt or "best_of_n"
    seeds = {"seed": config.sampling.seed + number - 1}
    # Only the last round's model is the run's.
    pushed = {} if number == config.rounds else {"push_to_hub": False}
    storage = config.storage and f"{config.storage.rstrip('/')}/round-{number}"
    return config.model_copy(
        update={
            "rounds": 1,
            "model": config.model.model_copy(update={"name": str(base)}),
            "sampling": config.sampling.model_copy(update=seeds),
            "train": config.train.model_copy(
                update={
                    "n": n,
                    "tilt": tilt,
                    "arguments": config.train.arguments.model_copy(update=pushed),
                }
            ),
            "storage": storage,
            "baselines": config.baselines if number == 1 else {},
        }
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (`train.learning_rate=1e-5`).

    Raises BonbonError naming the wrong key or value and what was expected. Names that need more
    than the configuration to check, such as the objective's, are checked before the first stage.
    """
    return parse_config(read_values(path), overrides, source=str(path))


def read_values(path: Path) -> Any:
    """Return the plain values of a YAML file; those in an older run's folder under today's keys."""
    values = read_yaml(path)
    is_run_s_own = path.name == "config.yaml" and (path.parent / ".bonbon").is_dir()
    return upgraded(values, RunConfig) if is_run_s_own else values


def parse_config(
    values: Any, overrides: Sequence[str] = (), source: str = "the configuration"
) -> RunConfig:
    """A checked configuration from plain values. Raises BonbonError as `load_config` does."""
    return parse_settings(RunConfig, values, overrides, source)
