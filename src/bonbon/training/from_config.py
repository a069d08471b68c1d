"""Builds what the trainer needs from the configuration: arguments, adapter, callbacks."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from bonbon.config.run import RunConfig
from bonbon.config.training import TrainConfig
from bonbon.system.errors import BonbonError, first_line
from bonbon.system.processes import process_count
from bonbon.training.arguments import BoNBoNConfig

# Settings of a training that transformers calls by another name.
_OTHER_NAMES = {
    "epochs": "num_train_epochs",
    "batch_size": "global_batch_size",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
}
# Further arguments that a run has no use for, and why.
_HIDDEN = {
    "do_train": "`bonbon train` trains",
    "do_eval": "train.eval_fraction says whether there is an evaluation loss",
    "do_predict": "`bonbon evaluate` measures",
    "resume_from_checkpoint": "a run resumes from its own newest checkpoint",
    "save_only_model": "a run could not resume from such checkpoints",
    "remove_unused_columns": "groups are not columns",
    "auto_find_batch_size": "train.arguments.max_batch_tokens limits the memory",
    "hub_strategy": "the finished model is uploaded once",
    "hub_always_push": "the finished model is uploaded once",
    "label_smoothing_factor": "objectives compare log-probabilities and have no labels",
    "neftune_noise_alpha": "with noise the policy would not begin at the base model",
    "train_sampling_strategy": "batches hold the same groups for any number of processes",
    "length_column_name": "groups are not columns",
    "hub_token": "it would be written to the run's folder; use `hf auth login`",
}
_NAMES = frozenset(field.name for field in fields(BoNBoNConfig))


def check_arguments(config: RunConfig) -> None:
    """Check the names in each `train.arguments`. Raises BonbonError for one that cannot be there.

    It is none of `BoNBoNConfig`'s fields, or one that the run sets itself.
    """
    for name, settings in config.trainings.items():
        section = "train" if name == config.model_name else f"baselines.{name}"
        own = {_OTHER_NAMES.get(key, key): key for key in TrainConfig.model_fields}
        by_run = _run_arguments(config, name, Path())
        for given in settings.arguments.model_extra or {}:
            where = f"{section}.arguments.{given}"
            if given in own or given in own.values():
                key = own.get(given, given)
                raise BonbonError(f"{where} cannot be set there; it is {section}.{key}")
            if given in by_run or given in _HIDDEN:
                reason = _HIDDEN.get(given, "the run sets it itself")
                raise BonbonError(f"{where} cannot be set: {reason}")
            if given not in _NAMES:
                close = get_close_matches(given, _NAMES, n=3)
                raise BonbonError(
                    f"{where}: transformers.TrainingArguments has no such field"
                    + (f"; did you mean {' or '.join(close)}?" if close else "")
                )


def training_arguments(config: RunConfig, name: str, output_dir: Path) -> BoNBoNConfig:
    """Build the trainer's arguments for the training of that name.

    `output_dir` is the folder of its checkpoints. Raises BonbonError for settings that do not work.
    """
    try:
        return _build_arguments(config, name, output_dir)
    # An optimiser or a logger that is not there, bf16 without it, a value of another type.
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise BonbonError(
            f"the training settings of {name} do not work: {first_line(error)}"
        ) from error


def _build_arguments(config: RunConfig, name: str, output_dir: Path) -> BoNBoNConfig:
    settings = config.trainings[name]
    check_arguments(config)
    values = dict(settings.arguments)  # the defaults and what was added
    values |= _own_arguments(settings) | _run_arguments(config, name, output_dir)
    arguments = BoNBoNConfig(**values)
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()  # which fails where its package is not installed
    if arguments.n_gpu > 1:  # or the Trainer would split batches over GPUs, multiplying their size
        arguments._n_gpu = 1
    return arguments


def _own_arguments(settings: TrainConfig) -> dict[str, Any]:
    """The settings of a training that are arguments of the trainer, under its names."""
    values = {_OTHER_NAMES.get(key, key): value for key, value in settings}
    return {name: value for name, value in values.items() if name in _NAMES}


def _run_arguments(config: RunConfig, name: str, output: Path) -> dict[str, Any]:
    """The arguments that a run sets by itself."""
    settings = config.trainings[name]
    stops_early = settings.early_stopping_patience is not None
    return {
        "output_dir": str(output),
        "temperature": config.sampling.temperature,
        "per_device_train_batch_size": math.ceil(settings.batch_size / process_count()),
        "per_device_eval_batch_size": settings.batch_size,
        "use_cpu": config.model.device == "cpu",
        "eval_strategy": "steps" if settings.eval_fraction > 0 else "no",
        "save_strategy": "steps",
        "save_steps": settings.eval_steps if stops_early else settings.save_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": stops_early,
        "restore_callback_states_from_checkpoint": True,  # or a stop would reset the patience
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "greater_is_better": False if stops_early else None,
        "push_to_hub": False,  # the trainer would upload its checkpoints; `bonbon train` the model
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "accelerator_config": _accelerator_config(),
    }


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


def keep_reports(trainer: Trainer, logs: Path) -> None:
    """Make TensorBoard write into `logs`, not beside the checkpoints, which are removed."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(logs)


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
