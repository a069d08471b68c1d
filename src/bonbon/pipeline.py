"""The stages of a run: sample → score → train → evaluate, each one folder in and one folder out.

Every stage can be stopped at any time and is gone on with by the same call; a finished shard, model
or evaluation is never made twice. `run` does them all.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config import ModelConfig, RunConfig, TrainConfig, round_config
from bonbon.digests import file_digest
from bonbon.errors import BonbonError
from bonbon.evaluation.measuring import BASE, Policy
from bonbon.evaluation.results import Evaluation
from bonbon.evaluation.stage import evaluate_policies, write_evaluation
from bonbon.files import atomic_folder, read_json, write_json, write_text
from bonbon.groups import Group, Groups, read_groups, shard_paths
from bonbon.model_card import model_card
from bonbon.models import load_policy
from bonbon.progress import progress_bar
from bonbon.prompts import hold_out
from bonbon.reward import score_groups
from bonbon.run_folder import RunFolder
from bonbon.sampling import TransformersSampler
from bonbon.stages import (
    build_reward,
    described,
    load_model,
    load_prompts,
    sample_shards,
    transform_shards,
)
from bonbon.trainer import BoNBoNConfig, BoNBoNTrainer, target_n

# --- sample ---------------------------------------------------------------------------------------


def sample(folder: RunFolder) -> None:
    """Draw n completions of every training prompt into `samples/`."""
    config = folder.config
    _refuse_rounds(config)
    rows, _ = load_prompts(config)
    folder.refuse("compare", what="a comparison")
    folder.refuse("generate", what="answers of `bonbon generate`")
    if not shard_paths(folder.samples):
        folder.forget("sample")  # nothing came of it
    folder.begin("sample", _sample_settings(config))
    if folder.is_finished("sample", folder.samples):
        return
    model, tokenizer = load_model(config.model)
    sampler = TransformersSampler(model, tokenizer, config.sampling)
    sample_shards(sampler, sampler.encode(rows), folder.samples, config.model, "sampling")
    folder.finish("sample", len(shard_paths(folder.samples)))


def _sample_settings(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", include={"model", "prompts", "sampling", "rounds"})
    values["prompts"]["content"] = file_digest(config.prompts.path)
    if config.evaluation.prompts is None:
        values["evaluation"] = {"holdout": config.evaluation.holdout}
    return values


# --- score ----------------------------------------------------------------------------------------


def score(folder: RunFolder) -> None:
    """Score every sampled shard into `groups/`."""
    config = folder.config
    _refuse_rounds(config)
    folder.begin("score", _score_settings(config))
    if not folder.is_finished("sample", folder.samples):
        raise BonbonError(f"{folder.samples} is not complete; run `bonbon sample` to the end first")
    if folder.is_finished("score", folder.groups):
        return
    reward = build_reward(config.reward)

    def scored(groups: Groups) -> list[Group]:
        scores = score_groups(reward, groups)
        return [group.with_rewards(s) for group, s in zip(groups, scores, strict=True)]

    noted = {"reward": described(config.reward)}
    transform_shards(folder.samples, folder.groups, scored, noted, "scoring")
    folder.finish("score", len(shard_paths(folder.groups)))


def _score_settings(config: RunConfig) -> dict[str, Any]:
    return _sample_settings(config) | config.model_dump(mode="json", include={"reward"})


# --- train ----------------------------------------------------------------------------------------


def train(folder: RunFolder) -> None:
    """Fine-tune the model, and the baselines, on the groups."""
    _refuse_rounds(folder.config)
    for name in folder.config.trainings:
        _train_one(folder, name)


def _check_trainings(folder: RunFolder) -> None:
    """Find wrong training settings before anything is drawn. Raises BonbonError."""
    for name in folder.config.trainings:
        target_n(_training_arguments(folder, name), folder.config.sampling.n)


def _train_one(folder: RunFolder, name: str) -> None:
    config = folder.config
    settings = config.trainings[name]
    folder.begin(folder.training(name), _train_settings(config, name))
    target = folder.model(name)
    if target.exists():
        return
    if not folder.is_finished("score", folder.groups):
        raise BonbonError(f"{folder.groups} is not complete; run `bonbon score` to the end first")
    groups, held_out = _split(read_groups(folder.groups), settings.eval_fraction)
    model, tokenizer = load_policy(
        config.model.name,
        revision=config.model.revision,
        dtype=settings.dtype,
        device="cpu",  # the trainer moves it
        trust_remote_code=config.model.trust_remote_code,
    )
    checkpoint = folder.last_checkpoint(name)
    trainer = BoNBoNTrainer(
        model,
        _training_arguments(folder, name),
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=_peft_config(settings),
        callbacks=_callbacks(settings),
    )
    assert trainer.selection is not None
    trainer.remove_callback(PrinterCallback)
    with progress_bar(f"training {name}", 0, "steps") as bar:
        trainer.add_callback(_BarCallback(bar))
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record = {
        "objective": settings.objective,
        "n": trainer.n,
        "tilt": trainer.tilt,
        "groups": len(groups),
        "held_out_groups": len(held_out or ()),
        "tied_groups_dropped": trainer.selection.tied,
        "seconds": time.monotonic() - began,
        "log": trainer.state.log_history,
    }
    _save_model(trainer, tokenizer, target, record, settings)
    shutil.rmtree(folder.checkpoints(name), ignore_errors=True)


def _split(groups: Groups, fraction: float) -> tuple[Groups, Groups | None]:
    """The groups to train on, and those held out for the evaluation loss."""
    if fraction == 0:
        return groups, None
    kept, held = hold_out(groups, fraction)
    if not kept or not held:
        raise BonbonError(
            f"train.eval_fraction = {fraction:g} of {len(groups)} groups leaves a side empty; "
            "change it"
        )
    return Groups(kept, groups.provenance), Groups(held, groups.provenance)


def _train_settings(config: RunConfig, name: str) -> dict[str, Any]:
    settings = config.trainings[name].model_dump(mode="json")
    return _score_settings(config) | {"train": settings}


def _training_arguments(folder: RunFolder, name: str) -> BoNBoNConfig:
    try:
        return _build_arguments(folder, name)
    except (ValueError, ImportError) as error:  # an optimiser that is not there, bf16 without it
        raise BonbonError(f"the training settings of {name} do not work: {error}") from error


def _build_arguments(folder: RunFolder, name: str) -> BoNBoNConfig:
    config, settings = folder.config, folder.config.trainings[name]
    stops_early = settings.early_stopping_patience is not None
    saving = settings.eval_steps if stops_early else settings.save_steps
    arguments = BoNBoNConfig(
        output_dir=str(folder.checkpoints(name)),
        objective=settings.objective,
        tilt=settings.tilt,
        n=settings.n,
        alpha=settings.alpha,
        beta=settings.beta,
        delta=settings.delta,
        temperature=config.sampling.temperature,
        share_prompt=settings.share_prompt,
        max_batch_tokens=settings.max_batch_tokens,
        kl_budget=settings.kl_budget,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
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
    )
    if arguments.n_gpu > 1:  # or the Trainer would split batches over GPUs, multiplying their size
        arguments._n_gpu = 1
    return arguments


def _peft_config(settings: TrainConfig) -> PeftConfig | None:
    lora = settings.lora
    if lora is None:
        return None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _callbacks(settings: TrainConfig) -> list[TrainerCallback]:
    patience = settings.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


class _BarCallback(TrainerCallback):
    """Shows the trainer's steps on our own progress bar."""

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


def _save_model(
    trainer: BoNBoNTrainer,
    tokenizer: Tokenizer,
    target: Path,
    record: dict[str, Any],
    settings: TrainConfig,
) -> None:
    """Save the model folder whole or not at all, safetensors only."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora is not None and settings.lora.merge:
        model = model.merge_and_unload()
    with atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training_log.json", record)


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(folder: RunFolder) -> Evaluation:
    """Sample, score and measure the base model and every trained one on the held-out prompts.

    Writes `evaluation/evaluation.json`, the plot beside it, and each trained model's card.
    """
    config = folder.config
    for name in config.trainings:
        if not folder.model(name).exists():
            command = "train" if config.rounds == 1 else "run"
            raise BonbonError(f"{folder.model(name)} does not exist; run `bonbon {command}` first")
        if config.rounds == 1:
            folder.compare(folder.training(name), _train_settings(config, name))
    if config.rounds > 1:
        folder.compare("rounds", _rounds_settings(config))
    folder.begin("evaluate", _evaluation_settings(config))
    training_rows, rows = load_prompts(config)
    evaluation = evaluate_policies(folder, _policies(folder), rows)
    trained_on = {json.dumps(row.prompt) for row in training_rows}
    seen = sum(
        json.dumps(group.prompt) in trained_on for group in read_groups(folder.evaluation / BASE)
    )
    about = {
        "main": config.model_name,
        "prompts_trained_on": seen,
        "prompts_left_out": len(rows) - evaluation.prompts,
    }
    write_evaluation(folder, evaluation, about)
    for name in config.trainings:
        record = read_json(folder.model(name) / "training_log.json")
        card = model_card(config, name, evaluation.models, evaluation.prompts, record)
        write_text(folder.model(name) / "README.md", card)
    return evaluation


def _policies(folder: RunFolder) -> list[Policy]:
    config = folder.config

    def trained(name: str) -> ModelConfig:  # the revision is that of an adapter's base
        return config.model.model_copy(update={"name": str(folder.model(name))})

    return [
        Policy(BASE, config.model, config.sampling),
        *(Policy(name, trained(name), config.sampling) for name in config.trainings),
    ]


def _evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """What the draws depend on; rewards and metrics can be added to them later."""
    values = _score_settings(config)
    values["trainings"] = {
        name: it.model_dump(mode="json") for name, it in config.trainings.items()
    }
    drawing = {"prompts", "holdout", "k", "seed"}
    values["evaluation"] = config.evaluation.model_dump(mode="json", include=drawing)
    if config.evaluation.prompts is not None:
        values["evaluation"]["prompts"]["content"] = file_digest(config.evaluation.prompts.path)
    return values


# --- all of them ----------------------------------------------------------------------------------


def run(folder: RunFolder) -> Evaluation:
    """All stages, from prompts to the evaluation, with `rounds` of the first three."""
    if folder.config.rounds > 1:
        _run_rounds(folder)
        return evaluate(folder)
    _check_trainings(folder)
    sample(folder)
    score(folder)
    train(folder)
    return evaluate(folder)


def _run_rounds(folder: RunFolder) -> None:
    """Rounds of sample, score and train, each in a run folder `round-R/`; then the models."""
    config = folder.config
    folder.refuse("compare", what="a comparison")
    folder.refuse("generate", what="answers of `bonbon generate`")
    folder.begin("rounds", _rounds_settings(config))
    base: Path | str = config.model.name
    steps = []
    for number in range(1, config.rounds + 1):
        steps.append(RunFolder(folder.path / f"round-{number}", round_config(config, number, base)))
        base = steps[-1].model(config.model_name)
    _check_trainings(steps[0])
    for step in steps:
        sample(step)
        score(step)
        train(step)
    for name in config.trainings:
        _publish(steps[-1 if name == config.model_name else 0].model(name), folder.model(name))


def _rounds_settings(config: RunConfig) -> dict[str, Any]:
    trainings = {name: it.model_dump(mode="json") for name, it in config.trainings.items()}
    return _score_settings(config) | {"trainings": trainings}


def _publish(source: Path, target: Path) -> None:
    """Put a round's model where a run's model lies, whole or not at all."""
    if not target.exists():
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary)


def _refuse_rounds(config: RunConfig) -> None:
    if config.rounds > 1:
        raise BonbonError(
            f"with rounds = {config.rounds} sampling, scoring and training take turns; use "
            "`bonbon run`"
        )
