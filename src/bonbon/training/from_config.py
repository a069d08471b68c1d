"""Builds what the trainer needs from the configuration: arguments, adapter, callbacks."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bonbon.config.run import RunConfig
from bonbon.config.training import TrainConfig
from bonbon.system.errors import BonbonError
from bonbon.system.processes import process_count
from bonbon.training.arguments import BoNBoNConfig


def training_arguments(config: RunConfig, name: str, output_dir: Path) -> BoNBoNConfig:
    """Build the trainer's arguments for the training of that name.

    `output_dir` is the folder of its checkpoints. Raises BonbonError for settings that do not work.
    """
    try:
        return _build_arguments(config, name, output_dir)
    except (ValueError, ImportError) as error:  # an optimiser that is not there, bf16 without it
        raise BonbonError(f"the training settings of {name} do not work: {error}") from error


def _build_arguments(config: RunConfig, name: str, output_dir: Path) -> BoNBoNConfig:
    settings = config.trainings[name]
    stops_early = settings.early_stopping_patience is not None
    saving = settings.eval_steps if stops_early else settings.save_steps
    arguments = BoNBoNConfig(
        output_dir=str(output_dir),
        objective=settings.objective,
        tilt=settings.tilt,
        n=settings.n,
        alpha=settings.alpha,
        beta=settings.beta,
        delta=settings.delta,
        temperature=config.sampling.temperature,
        share_prompt=settings.share_prompt,
        logprobs=settings.logprobs,
        max_batch_tokens=settings.max_batch_tokens,
        kl_budget=settings.kl_budget,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        global_batch_size=settings.batch_size,
        per_device_train_batch_size=math.ceil(settings.batch_size / process_count()),
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim=settings.optimizer,
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=config.model.device == "cpu",
        eval_strategy="steps" if settings.eval_fraction > 0 else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=saving,
        save_total_limit=2,
        load_best_model_at_end=stops_early,
        restore_callback_states_from_checkpoint=True,  # or a stop would reset the patience
        metric_for_best_model="eval_loss" if stops_early else None,
        greater_is_better=False if stops_early else None,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        accelerator_config=_accelerator_config(),
    )
    if arguments.n_gpu > 1:  # or the Trainer would split batches over GPUs, multiplying their size
        arguments._n_gpu = 1
    return arguments


def _accelerator_config() -> dict[str, Any]:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return {}
    # Else each process would hold the whole gradient of batches whose gradients are accumulated.
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def peft_config_of(settings: TrainConfig) -> PeftConfig | None:
    """Build the adapter's configuration, None to train all weights.

    Raises BonbonError for an adapter on quantised weights that is to be merged.
    """
    lora = settings.lora
    if lora is None:
        return None
    if lora.quantization is not None and lora.merge:
        raise BonbonError(
            "an adapter that was trained on quantised weights cannot be merged into them; set "
            "train.lora.merge to false"
        )
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def callbacks_of(settings: TrainConfig) -> list[TrainerCallback]:
    """Build the callbacks that the settings ask for: early stopping, or none."""
    patience = settings.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


class ProgressCallback(TrainerCallback):
    """Shows the trainer's steps, its loss and its accuracy on a progress bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.set(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        shown = {key: logs[key] for key in ("loss", "accuracy") if logs and key in logs}
        if shown:
            self.bar.note(", ".join(f"{key} {value:.3g}" for key, value in shown.items()))
