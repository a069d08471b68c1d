"""Settings of a training: the one place of their defaults, ranges and explanations."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from bonbon.config.fields import Neutral
from bonbon.config.sampling import DType
from bonbon.config.settings import Settings

PAPER_ALPHA = 0.005
LARGEST_N = 10_000  # beyond, targets by rank are no longer exact


class LoraSettings(Settings):
    """Train a LoRA adapter instead of all weights."""

    r: int = Field(16, ge=1, description="The rank of the adapter's matrices.")
    alpha: float = Field(32, gt=0, description="The adapter's output is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "all-linear", description="The layers that get an adapter, as peft names them."
    )
    merge: bool = Field(
        False, description="Save whole weights, with the adapter merged in, and no adapter."
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="Hold the frozen weights in 4 or 8 bits, by bitsandbytes (QLoRA)."
    )


class TrainerArguments(Settings):
    """Rarely needed arguments of the trainer.

    Any other field of `transformers.TrainingArguments` may stand here too and is passed on as it
    is, except for those that the run sets itself.
    """

    model_config = ConfigDict(extra="allow")

    adam_beta2: float = Field(
        0.98, gt=0, lt=1, description="Decay of Adam's average of squared gradients."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimiser.")
    max_grad_norm: float = Field(
        10.0, gt=0, description="Gradients with a larger norm are scaled down to it."
    )
    delta: float = Field(4.0, gt=0, description="Huber's delta of rank_regression_huber, in nats.")
    share_prompt: bool | None = Field(
        None,
        description="Compute a prompt once for all its completions. None: where the model allows "
        "it and it saves time.",
    )
    max_batch_tokens: Neutral[int | None] = Field(
        None,
        ge=1,
        description="Most tokens in a forward pass: a batch with more is done in several passes, "
        "with the same gradient. None: 4,096 on a CPU, 32,768 elsewhere.",
    )
    kl_prompts: int = Field(64, ge=1, description="Prompts on which kl_budget measures the KL.")
    kl_samples: int = Field(
        4, ge=1, description="Completions of each prompt on which kl_budget measures the KL."
    )
    logging_steps: Neutral[float] = Field(
        10, gt=0, description="Steps between two entries of the training log; below 1: their share."
    )
    report_to: Neutral[str | list[str] | None] = Field(
        "none",
        description="Where the training log goes too: tensorboard, wandb or another integration of "
        "transformers.",
    )
    push_to_hub: Neutral[bool] = Field(
        False, description="Upload the finished model to the Hugging Face Hub."
    )
    hub_model_id: Neutral[str | None] = Field(
        None, description="The repository to upload to, as owner/name; push_to_hub needs it."
    )

    @model_validator(mode="after")
    def _push_needs_a_repository(self) -> Self:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs a hub_model_id, such as owner/name")
        return self


class TrainConfig(Settings):
    """Fine-tuning on the ranks of each group's completions. Batches count groups."""

    objective: str = Field("rank_regression", description="The training objective.")
    tilt: str | None = Field(
        None,
        description="The distribution that objectives of all ranks aim at. None: optimal (the win "
        "rate of best-of-n at the least KL); best_of_n for weighted_sft and in rounds.",
    )
    n: float | None = Field(
        None,
        gt=1,
        le=LARGEST_N,
        description="The n of the best-of-n to aim at. None: as many completions as were drawn of "
        "each prompt.",
    )
    learning_rate: float = Field(
        5e-7,
        gt=0,
        description="The peak learning rate. The default is the paper's for 2.8 B parameters; "
        "small models need more.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over all groups.")
    batch_size: int = Field(16, ge=1, description="Groups in a batch, over all processes.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Batches whose gradients are added up before a step."
    )
    alpha: float = Field(
        PAPER_ALPHA,
        ge=0,
        le=1,
        description="Weight of the SFT part in bonbon, bonbon_dpo and bonbon_ranks.",
    )
    beta: float = Field(0.1, gt=0, description="The beta of the dpo and ipo objectives.")
    optimizer: str = Field(
        "adamw_torch", description="An optimiser of transformers. The paper: rmsprop."
    )
    lr_scheduler: str = Field("linear", description="A learning rate schedule of transformers.")
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="The share of the steps in which the learning rate rises."
    )
    seed: int = Field(0, description="Seed of the order of the groups and of new adapters.")
    dtype: DType = Field("float32", description="Number format of the trained weights.")
    bf16: bool = Field(False, description="Compute in bfloat16 (autocast).")
    gradient_checkpointing: bool = Field(
        False, description="Save memory: compute activations a second time in the backward pass."
    )
    logprobs: Literal["recompute", "sampled"] | None = Field(
        None,
        description="The base model's log-probabilities: recompute (before the first step) or "
        "sampled (as noted when drawing). None: recompute where another engine drew or the weights "
        "are quantised.",
    )
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="In nats a completion: after training, move the weights back towards the base "
        "model until their measured KL from it is at most this.",
    )
    save_steps: int = Field(200, ge=1, description="Steps between two checkpoints.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the groups held out for the evaluation loss."
    )
    eval_steps: int = Field(50, ge=1, description="Steps between two evaluation losses.")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many evaluation losses without a new best, and keep the best.",
    )
    lora: LoraSettings | None = Field(None, description="Train an adapter. None: all weights.")
    arguments: TrainerArguments = Field(
        TrainerArguments(), description="Rarely needed arguments of the trainer."
    )

    @field_validator("tilt")
    @classmethod
    def _tilt_exists(cls, tilt: str | None) -> str | None:
        from bonbon.tilt.catalogue import TILTS

        if tilt is not None and tilt not in TILTS:
            raise ValueError(f"unknown tilt; choose one of {', '.join(TILTS)}")
        return tilt

    @model_validator(mode="after")
    def _early_stopping_needs_groups(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_fraction == 0:
            raise ValueError("early_stopping_patience needs an eval_fraction above 0")
        return self


class ArgumentsOfARun(Settings):
    """Arguments of `BoNBoNConfig` that a run takes from other settings."""

    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Groups in a batch over all processes, which get shares as equal as can be. "
        "None: per_device_train_batch_size for each process.",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="The temperature the groups were drawn at. None: as the groups say, else 1.",
    )
