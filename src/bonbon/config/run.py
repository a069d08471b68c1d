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

    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerConfig = TransformersSamplerConfig()
    reward: RewardConfig
    engine: EngineConfig = LocalEngineConfig()
    storage: str | None = Field(
        None,
        min_length=1,
        description="where samples and groups go: a folder or s3://…, gs://…, hdfs://…; None: the "
        "run's folder",
    )
    rounds: int = Field(
        1, ge=1, description="sample, score and train this often, each time from the last model"
    )
    train: TrainConfig = TrainConfig()
    baselines: dict[str, TrainConfig] = Field(
        default_factory=dict, description="further models, trained and measured beside"
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.sampling.n < 2:
            raise ValueError(
                "sampling.n: best-of-n against worst needs n >= 2; with n = 1 nothing is chosen"
            )
        by_likelihood = ("sft_bon", "weighted_sft")
        cut = [t.objective for t in self.trainings.values() if t.objective not in by_likelihood]
        if self.sampling.truncates and cut:
            raise ValueError(
                f"sampling.top_k and top_p cut the distribution that objective {cut[0]} compares "
                "the policy with; leave them out, or train with sft_bon or weighted_sft alone"
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
    storage = config.storage and f"{config.storage.rstrip('/')}/round-{number}"
    return config.model_copy(
        update={
            "rounds": 1,
            "model": config.model.model_copy(update={"name": str(base)}),
            "sampling": config.sampling.model_copy(update=seeds),
            "train": config.train.model_copy(update={"n": n, "tilt": tilt}),
            "storage": storage,
            "baselines": config.baselines if number == 1 else {},
        }
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (`train.learning_rate=1e-5`).

    Raises BonbonError naming the wrong key or value and what was expected.
    """
    return parse_config(read_yaml(path), overrides, source=str(path))


def parse_config(
    values: Any, overrides: Sequence[str] = (), source: str = "the configuration"
) -> RunConfig:
    """A checked configuration from plain values. Raises BonbonError as `load_config` does."""
    return parse_settings(RunConfig, values, overrides, source)
