"""The stage `train`: reads groups and writes trained models, in one process or in several."""

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

from huggingface_hub import HfApi
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.run import RunConfig
from bonbon.config.training import TrainConfig, TrainerArguments
from bonbon.groups.prompts import is_held_out
from bonbon.groups.shards import StoredGroups, open_groups
from bonbon.models.loading import load_policy
from bonbon.runs.fingerprints import refuse_rounds
from bonbon.runs.run_folder import RunFolder
from bonbon.stages.checks import check_config
from bonbon.system.atomic_files import atomic_folder, write_json
from bonbon.system.errors import BonbonError, DivergedError, first_line
from bonbon.system.processes import (
    from_main_process,
    is_main_process,
    leave,
    process_count,
    wait_for_everyone,
)
from bonbon.system.progress import progress_bar
from bonbon.training.arguments import target_n
from bonbon.training.dataset_file import SelectedGroups
from bonbon.training.from_config import (
    ProgressCallback,
    callbacks_of,
    keep_reports,
    peft_config_of,
    training_arguments,
)
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer

_SPLIT = "eval_fraction"  # a split independent of the one that holds out the evaluation's prompts


def train(folder: RunFolder) -> None:
    """Fine-tune the model, and the baselines, on the groups.

    Each of the processes that `torchrun` or `accelerate launch` started calls this. Raises
    BonbonError for settings that do not work and for groups that are not complete.
    """
    refuse_rounds(folder.config)
    check_trainings(folder)
    for name in folder.config.trainings:
        _train_one(folder, name)
    leave()


def check_trainings(folder: RunFolder) -> None:
    """Raise BonbonError for wrong training settings, before anything is drawn."""
    check_config(folder.config)
    for name, settings in folder.config.trainings.items():
        target_n(_arguments(folder, name), folder.config.sampling.n)
        peft_config_of(settings)


def _arguments(folder: RunFolder, name: str) -> BoNBoNConfig:
    return training_arguments(folder.config, name, folder.checkpoints(name))


def _train_one(folder: RunFolder, name: str) -> None:
    settings = folder.config.trainings[name]
    folder.begin_training(name)
    if from_main_process(folder.model(name).exists):
        return
    if not folder.is_done("score"):
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
            _remove_checkpoints(folder, name)  # so that other settings can be trained with
            raise
    assert trainer.selection is not None
    record = {
        "objective": settings.objective,
        "n": trainer.n,
        "tilt": trainer.tilt,
        "groups": _count(trainer.selection),
        "held_out_groups": _count(trainer.held_out),
        "tied_groups_dropped": trainer.selection.tied,
        "seconds": time.monotonic() - began,
        "log": [_as_json(entry) for entry in trainer.state.log_history],
    }
    _save_model(trainer, folder, name, record)
    _remove_checkpoints(folder, name)
    if settings.arguments.push_to_hub and is_main_process():
        _push(folder.model(name), settings.arguments)


def _count(groups: SelectedGroups | None) -> int:
    """Return how many groups there were, those that tie among them."""
    return 0 if groups is None else len(groups) + groups.tied


def _remove_checkpoints(folder: RunFolder, name: str) -> None:
    if is_main_process():
        shutil.rmtree(folder.checkpoints(name), ignore_errors=True)


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace what JSON does not have, NaN and infinities, by None in a line of the log."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def _trainer(
    folder: RunFolder, name: str, groups: StoredGroups, held_out: StoredGroups | None
) -> BoNBoNTrainer:
    settings = folder.config.trainings[name]
    peft_config = peft_config_of(settings)
    # Before the model is loaded, since DeepSpeed's ZeRO-3 then shards it while it loads.
    arguments = _arguments(folder, name)
    model, tokenizer = _base(folder.config, settings, arguments)
    trainer = BoNBoNTrainer(
        model,
        arguments,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks_of(settings),
    )
    trainer.remove_callback(PrinterCallback)
    keep_reports(trainer, folder.path / "tensorboard" / name)
    if trainer.is_deepspeed_enabled:
        _check_zero3(trainer.accelerator.state.deepspeed_plugin, settings)
    return trainer


def _check_zero3(plugin: Any, settings: TrainConfig) -> None:
    """Raise BonbonError for settings of ZeRO-3 with which the trained model cannot be saved."""
    if plugin.zero_stage != 3:
        return
    zero = plugin.deepspeed_config["zero_optimization"]
    if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise BonbonError(
            "with DeepSpeed's ZeRO-3 the model is only saved where "
            "stage3_gather_16bit_weights_on_model_save (accelerate: zero3_save_16bit_model) is "
            "true; set it to true"
        )
    if settings.lora is not None and settings.lora.merge:
        raise BonbonError(
            "train.lora.merge does not work with DeepSpeed's ZeRO-3; set it to false, or shard "
            "the weights by FSDP or ZeRO-2"
        )


def _base(
    config: RunConfig, settings: TrainConfig, arguments: BoNBoNConfig
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the model to start from: on the CPU, or if quantised, on the device it stays on."""
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
    """Show the trainer's steps, in the main process only."""
    if not is_main_process():
        yield
        return
    with progress_bar(title, 0, "steps") as bar:
        trainer.add_callback(ProgressCallback(bar))
        yield


def _check_checkpoint(trainer: BoNBoNTrainer, checkpoint: Path) -> None:
    """Raise BonbonError for a checkpoint of processes that sharded the weights in another way."""
    states = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if states:
        written = f"DeepSpeed with a world size of {states}"
    elif any(checkpoint.glob("pytorch_model_fsdp*")):
        written = "FSDP"
    else:
        written = "whole weights in each process"
    if trainer.is_deepspeed_enabled:
        now = f"DeepSpeed with a world size of {process_count()}"
    else:
        now = "FSDP" if trainer.is_fsdp_enabled else "whole weights in each process"
    if written != now:
        raise BonbonError(
            f"the training in {checkpoint} was begun with {written} and cannot be resumed with "
            f"{now}; launch it as before, or remove that folder to train from the start"
        )


def _split(groups: StoredGroups, fraction: float) -> tuple[StoredGroups, StoredGroups | None]:
    """Divide the groups into those to train on and those held out for the evaluation loss.

    Raises BonbonError where one of the two would be empty.
    """
    if fraction == 0:
        return groups, None
    kept = replace(groups, wanted=lambda group: not is_held_out(group, fraction, _SPLIT))
    held = replace(groups, wanted=lambda group: is_held_out(group, fraction, _SPLIT))
    if from_main_process(lambda: _is_empty(kept) or _is_empty(held)):
        raise BonbonError(
            f"train.eval_fraction = {fraction:g} leaves no groups to train on, or none to "
            "evaluate; change it, or draw for more prompts"
        )
    return kept, held


def _is_empty(groups: StoredGroups) -> bool:
    return next(iter(groups), None) is None


def _save_model(
    trainer: BoNBoNTrainer, folder: RunFolder, name: str, record: dict[str, Any]
) -> None:
    """Save the model's folder, whole or not at all, with weights as safetensors only."""
    weights = trainer.gathered_weights()  # all processes must take part
    if is_main_process():
        tokenizer: Any = trainer.processing_class
        with atomic_folder(folder.model(name)) as temporary:
            _save_weights(trainer, folder, name, weights, temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "training_log.json", record)
    wait_for_everyone()


def _push(model: Path, arguments: TrainerArguments) -> None:
    """Upload a finished model. Raises BonbonError where that fails; the model is there anyway."""
    repository = str(arguments.hub_model_id)
    further = arguments.model_extra or {}
    hub = HfApi()
    try:
        hub.create_repo(repository, private=further.get("hub_private_repo"), exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=model, revision=further.get("hub_revision")
        )
    except Exception as error:  # the hub's, its HTTP library's or a file's
        raise BonbonError(
            f"{model} is trained but could not be uploaded to {repository}: {first_line(error)}; "
            f"upload it with `hf upload {repository} {model}`"
        ) from error


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
