"""Settings of a training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bonbon.config.sampling import DType
from bonbon.config.settings import Settings

ObjectiveName = Literal[
    "bonbon",
    "sft_bon",
    "ipo_bon",
    "bonbon_dpo",
    "bonbon_ranks",
    "rank_regression",
    "rank_regression_pointwise",
    "rank_regression_huber",
    "weighted_sft",
    "dpo",
    "dpo_best_random",
    "dpo_random_pair",
    "ipo",
    "ipo_best_random",
    "ipo_random_pair",
]


LARGEST_N = 10_000  # beyond, targets by rank are no longer exact


TiltName = Literal["best_of_n", "optimal", "worst_of_n"]


class LoraSettings(Settings):
    """Train a LoRA adapter instead of all weights."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    merge: bool = Field(False, description="save whole weights with the adapter merged in")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="of the frozen weights, by bitsandbytes (QLoRA)"
    )


class TrainConfig(Settings):
    """Fine-tuning on the ranks of each group's completions. Batches count groups."""

    objective: ObjectiveName = "rank_regression"
    tilt: TiltName | None = Field(
        None,
        description="what objectives of all ranks aim at; None: optimal, best_of_n for "
        "weighted_sft and in rounds",
    )
    n: float | None = Field(None, gt=1, le=LARGEST_N, description="aimed at; None: sampling.n")
    learning_rate: float = Field(5e-7, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(16, ge=1, description="groups a step, over all processes")
    gradient_accumulation_steps: int = Field(1, ge=1)
    alpha: float = Field(0.005, ge=0, le=1)
    beta: float = Field(0.1, gt=0, description="of the dpo and ipo baselines")
    delta: float = Field(4.0, gt=0, description="Huber's, in nats, of rank_regression_huber")
    optimizer: str = Field("adamw_torch", description="a transformers optimiser; paper: rmsprop")
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    lr_scheduler: str = "linear"
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(10.0, gt=0)
    seed: int = 0
    dtype: DType = Field("float32", description="of the trained weights")
    bf16: bool = Field(False, description="compute in bfloat16 (autocast)")
    gradient_checkpointing: bool = False
    share_prompt: bool | None = None
    logprobs: Literal["recompute", "sampled"] | None = Field(
        None,
        description="the base model's: computed anew before training, or those of the draws; "
        "None: anew where another engine drew",
    )
    max_batch_tokens: int | None = Field(None, ge=1, description="a pass; None: by the device")
    kl_budget: float | None = Field(
        None, gt=0, description="nats; go back towards the base until the measured KL is within it"
    )
    save_steps: int = Field(200, ge=1)
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="groups held out for the eval loss")
    eval_steps: int = Field(50, ge=1)
    early_stopping_patience: int | None = Field(None, ge=1)
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _early_stopping_needs_groups(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_fraction == 0:
            raise ValueError("early_stopping_patience needs an eval_fraction above 0")
        return self
