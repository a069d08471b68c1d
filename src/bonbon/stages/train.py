"""The stage `train`: from groups to a model's folder, in one process or in several."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.run import RunConfig
from bonbon.config.training import TrainConfig
from bonbon.groups.prompts import is_held_out
from bonbon.groups.shards import StoredGroups, open_groups
from bonbon.models.loading import load_policy
from bonbon.runs.fingerprints import refuse_rounds, train_settings
from bonbon.runs.run_folder import RunFolder
from bonbon.system.atomic_files import atomic_folder, write_json
from bonbon.system.errors import BonbonError, DivergedError
from bonbon.system.processes import (
    from_main_process,
    is_main_process,
    leave,
    process_count,
    wait_for_everyone,
)
from bonbon.system.progress import progress_bar
from bonbon.training.arguments import target_n
from bonbon.training.from_config import _BarCallback, _callbacks, _peft_config, _training_arguments
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer

_SPLIT = "eval_fraction"  # apart from that of the evaluation's prompts, which are not among these


def train(folder: RunFolder) -> None:
    """Fine-tune the model, and the baselines, on the groups.

    Processes that `torchrun` or `accelerate launch` started do it together: all call this.
    """
    refuse_rounds(folder.config)
    check_trainings(folder)
    for name in folder.config.trainings:
        _train_one(folder, name)
    leave()


def check_trainings(folder: RunFolder) -> None:
    """Find wrong training settings before anything is drawn. Raises BonbonError."""
    for name, settings in folder.config.trainings.items():
        target_n(_training_arguments(folder, name), folder.config.sampling.n)
        _peft_config(settings)


def _train_one(folder: RunFolder, name: str) -> None:
    settings = folder.config.trainings[name]
    folder.begin_training(name, train_settings(folder.config, name))
    if from_main_process(folder.model(name).exists):
        return
    if not folder.is_finished("score", folder.groups):
        raise BonbonError(f"{folder.groups} is not complete; run `bonbon score` to the end first")
    stored = from_main_process(lambda: open_groups(folder.groups))
    groups, held_out = _split(stored, settings.eval_fraction)
    trainer = _trainer(folder, name, groups, held_out)
    checkpoint = from_main_process(lambda: folder.last_checkpoint(name))
    if checkpoint is not None:
        _check_checkpoint(trainer, checkpoint)
    with _shown(trainer, f"training {name}"):
        began = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except DivergedError:
            _remove_checkpoints(folder, name)  # so that it can be begun with other settings
            raise
    assert trainer.selection is not None
    record = {
        "objective": settings.objective,
        "n": trainer.n,
        "tilt": trainer.tilt,
        "groups": trainer.selection.found,
        "held_out_groups": trainer.held_out.found if trainer.held_out else 0,
        "tied_groups_dropped": trainer.selection.tied,
        "seconds": time.monotonic() - began,
        "log": [_as_json(entry) for entry in trainer.state.log_history],
    }
    _save_model(trainer, folder, name, record)
    _remove_checkpoints(folder, name)


def _remove_checkpoints(folder: RunFolder, name: str) -> None:
    if is_main_process():
        shutil.rmtree(folder.checkpoints(name), ignore_errors=True)


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of the trainer's log; JSON has no NaN and no infinities."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def _trainer(
    folder: RunFolder, name: str, groups: StoredGroups, held_out: StoredGroups | None
) -> BoNBoNTrainer:
    settings = folder.config.trainings[name]
    peft_config = _peft_config(settings)
    # Before the model is loaded, which DeepSpeed's ZeRO-3 shards as it comes.
    arguments = _training_arguments(folder, name)
    model, tokenizer = _base(folder.config, settings, arguments)
    trainer = BoNBoNTrainer(
        model,
        arguments,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=_callbacks(settings),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_deepspeed_enabled:
        _check_zero3(trainer.accelerator.state.deepspeed_plugin, settings)
    return trainer


def _check_zero3(plugin: Any, settings: TrainConfig) -> None:
    """Raise BonbonError for a model that could not be saved in the end."""
    if plugin.zero_stage != 3:
        return
    zero = plugin.deepspeed_config["zero_optimization"]
    if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise BonbonError(
            "with DeepSpeed's ZeRO-3 the model is only saved where "
            "stage3_gather_16bit_weights_on_model_save (accelerate: zero3_save_16bit_model) is "
            "true; set it"
        )
    if settings.lora is not None and settings.lora.merge:
        raise BonbonError(
            "train.lora.merge does not go with DeepSpeed's ZeRO-3; set it to false, or share the "
            "weights by FSDP or ZeRO-2"
        )


def _base(
    config: RunConfig, settings: TrainConfig, arguments: BoNBoNConfig
) -> tuple[PreTrainedModel, Tokenizer]:
    """The model to start from, on the CPU, as the trainer moves it; quantised, where it stays."""
    quantization = None if settings.lora is None else settings.lora.quantization
    return load_policy(
        config.model.name,
        revision=config.model.revision,
        dtype="bfloat16" if quantization and settings.bf16 else settings.dtype,
        device=str(arguments.device) if quantization else "cpu",
        trust_remote_code=config.model.trust_remote_code,
        quantization=quantization,
    )


@contextmanager
def _shown(trainer: BoNBoNTrainer, title: str) -> Iterator[None]:
    """Show the trainer's steps, in the main process alone."""
    if not is_main_process():
        yield
        return
    with progress_bar(title, 0, "steps") as bar:
        trainer.add_callback(_BarCallback(bar))
        yield


def _check_checkpoint(trainer: BoNBoNTrainer, checkpoint: Path) -> None:
    """Raise BonbonError for a checkpoint of processes that shared the weights in another way."""
    states = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if states:
        written = f"DeepSpeed with a world size of {states}"
    elif any(checkpoint.glob("pytorch_model_fsdp*")):
        written = "FSDP"
    else:
        written = "whole weights in each process"
    if trainer.is_deepspeed_enabled:
        asked = f"DeepSpeed with a world size of {process_count()}"
    else:
        asked = "FSDP" if trainer.is_fsdp_enabled else "whole weights in each process"
    if written != asked:
        raise BonbonError(
            f"the training in {checkpoint} was begun with {written} and cannot go on with {asked}; "
            "launch it as before, or remove that folder to train anew"
        )


def _split(groups: StoredGroups, fraction: float) -> tuple[StoredGroups, StoredGroups | None]:
    """The groups to train on, and those held out for the evaluation loss."""
    if fraction == 0:
        return groups, None
    kept = replace(groups, wanted=lambda group: not is_held_out(group, fraction, _SPLIT))
    held = replace(groups, wanted=lambda group: is_held_out(group, fraction, _SPLIT))
    if from_main_process(lambda: _is_empty(kept) or _is_empty(held)):
        raise BonbonError(
            f"train.eval_fraction = {fraction:g} of the groups leaves a side empty; change it"
        )
    return kept, held


def _is_empty(groups: StoredGroups) -> bool:
    return next(iter(groups), None) is None


def _save_model(
    trainer: BoNBoNTrainer, folder: RunFolder, name: str, record: dict[str, Any]
) -> None:
    """Save the model folder whole or not at all, safetensors only."""
    weights = trainer.gathered_weights()  # which takes all processes
    if is_main_process():
        tokenizer: Any = trainer.processing_class
        with atomic_folder(folder.model(name)) as temporary:
            _save_weights(trainer, folder, name, weights, temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "training_log.json", record)
    wait_for_everyone()


def _save_weights(
    trainer: BoNBoNTrainer, folder: RunFolder, name: str, weights: Any, target: Path
) -> None:
    settings = folder.config.trainings[name]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora is None or not settings.lora.merge:
        model.save_pretrained(target, state_dict=weights)
    elif weights is None:
        model.merge_and_unload().save_pretrained(target)
    else:
        with TemporaryDirectory() as adapter:
            model.save_pretrained(adapter, state_dict=weights)
            base, _ = _base(folder.config, settings, trainer.args)
            merged: Any = PeftModel.from_pretrained(base, adapter)
            merged.merge_and_unload().save_pretrained(target)
