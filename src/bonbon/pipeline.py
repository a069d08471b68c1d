"""The stages of a run: sample → score → train → evaluate, each one folder in and one folder out.

Every stage can be stopped at any time and is gone on with by the same call; a finished shard, model
or evaluation is never made twice. `run` does them all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config import (
    PromptsConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    round_config,
)
from bonbon.errors import BonbonError
from bonbon.evaluation import Evaluator, ModelEvaluation, completion_kls
from bonbon.files import atomic_folder, read_json, write_json, write_text
from bonbon.groups import (
    Group,
    Groups,
    read_groups,
    read_shard,
    shard_indices,
    shard_path,
    shard_paths,
    shard_rows,
    write_shard,
)
from bonbon.model_card import model_card
from bonbon.models import load_policy
from bonbon.progress import progress_bar
from bonbon.prompts import PromptRow, hold_out, read_prompts
from bonbon.reward import FunctionReward, Reward, RewardModel, WeightedSum, score_groups
from bonbon.run_folder import RunFolder, file_digest
from bonbon.sampling import EncodedPrompt, TransformersSampler
from bonbon.trainer import BoNBoNConfig, BoNBoNTrainer, target_n

BASE = "base"


# --- what the configuration names -----------------------------------------------------------------


def build_reward(config: RewardConfig) -> Reward:
    """The reward that a configuration describes. Raises BonbonError when it cannot be loaded."""
    if config.sum:
        return WeightedSum(tuple((part.weight, build_reward(part)) for part in config.sum))
    if config.function:
        return FunctionReward.from_name(config.function)
    assert config.model is not None
    return RewardModel.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_batch_tokens=config.max_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def load_prompts(config: RunConfig) -> tuple[list[PromptRow], list[PromptRow]]:
    """The prompts to train on and those to evaluate on."""
    training = _read(config.prompts)
    if config.evaluation.prompts is not None:
        return training, _read(config.evaluation.prompts)
    kept, held = hold_out(training, config.evaluation.holdout)
    if not kept or not held:
        raise BonbonError(
            f"{config.prompts.path}: {len(training)} prompts are too few to hold out "
            f"{config.evaluation.holdout:.0%} for the evaluation; set evaluation.prompts"
        )
    return kept, held


def _read(prompts: PromptsConfig) -> list[PromptRow]:
    return read_prompts(
        prompts.path, prompts.column, prompts.id_column, prompts.split, prompts.limit
    )


def _load_base(config: RunConfig) -> tuple[PreTrainedModel, Tokenizer]:
    model = config.model
    return load_policy(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )


# --- sample ---------------------------------------------------------------------------------------


def sample(folder: RunFolder) -> None:
    """Draw n completions of every training prompt into `samples/`."""
    config = folder.config
    _refuse_rounds(config)
    rows, _ = load_prompts(config)
    folder.begin("sample", _sample_settings(config))
    if folder.is_finished("sample", folder.samples):
        return
    model, tokenizer = _load_base(config)
    sampler = TransformersSampler(model, tokenizer, config.sampling)
    _sample_shards(sampler, sampler.encode(rows), folder.samples, _provenance(config), "sampling")
    folder.finish("sample", len(shard_paths(folder.samples)))


def _sample_settings(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", include={"model", "prompts", "sampling", "rounds"})
    values["prompts"]["content"] = file_digest(config.prompts.path)
    if config.evaluation.prompts is None:
        values["evaluation"] = {"holdout": config.evaluation.holdout}
    return values


def _provenance(config: RunConfig) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "revision": config.model.revision,
        "sampling": config.sampling.model_dump(mode="json"),
    }


def _sample_shards(
    sampler: TransformersSampler,
    prompts: Sequence[EncodedPrompt],
    folder: Path,
    provenance: dict[str, Any],
    title: str,
) -> None:
    size = sampler.config.shard_size
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    todo = [index for index in range(len(shards)) if not shard_path(folder, index).exists()]
    provenance = {**provenance, "dtype": str(sampler.model.dtype).removeprefix("torch.")}
    total = sum(len(shards[index]) for index in todo) * sampler.config.n
    with progress_bar(title, total, "completions") as bar:
        for index in todo:
            groups = sampler.sample(shards[index], progress=bar.tokens)
            write_shard(shard_path(folder, index), groups, provenance)
            bar.advance(sum(group.n for group in groups))


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

    described = {"reward": _described(config.reward)}
    _each_shard(folder.samples, folder.groups, scored, described, "scoring")
    folder.finish("score", len(shard_paths(folder.groups)))


def _each_shard(
    source: Path,
    target: Path,
    transform: Callable[[Groups], list[Group]],
    provenance: dict[str, Any],
    title: str,
) -> None:
    """Write the transformed groups of every shard of `source` that `target` lacks."""
    todo = [i for i in shard_indices(source) if not shard_path(target, i).exists()]
    total = sum(shard_rows(shard_path(source, index)) for index in todo)
    with progress_bar(title, total, "prompts") as bar:
        for index in todo:
            shard = read_shard(shard_path(source, index))
            groups = transform(shard)
            write_shard(shard_path(target, index), groups, shard.provenance | provenance)
            bar.advance(len(groups))


def _score_settings(config: RunConfig) -> dict[str, Any]:
    return _sample_settings(config) | config.model_dump(mode="json", include={"reward"})


def _described(reward: RewardConfig) -> dict[str, Any]:
    return reward.model_dump(mode="json", exclude_defaults=True)


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


def evaluate(folder: RunFolder) -> dict[str, ModelEvaluation]:
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
    names = [BASE, *config.trainings]
    todo = [n for n in names if not folder.is_finished(f"evaluate-{n}", folder.evaluation / n)]
    if todo:
        _draw_and_measure(folder, todo, rows)
    n, k = config.target_n, config.evaluation.k
    measured = {name: read_groups(folder.evaluation / name) for name in names}
    evaluator = Evaluator(measured[BASE], n, k, config.evaluation.bootstrap)
    results = {BASE: evaluator.base_model(), f"best-of-{n}": evaluator.best_of_n()} | {
        name: evaluator.model(measured[name]) for name in config.trainings
    }
    trained_on = {json.dumps(row.prompt) for row in training_rows}
    seen = sum(json.dumps(group.prompt) in trained_on for group in measured[BASE])
    _write_evaluation(folder, results, len(measured[BASE]), seen)
    return results


def _draw_and_measure(folder: RunFolder, names: Sequence[str], rows: Sequence[PromptRow]) -> None:
    """Sample and measure the named models; the base model stays loaded for the KLs."""
    config = folder.config
    base, base_tokenizer = _load_base(config)
    rewards = {"": build_reward(config.reward)} | {
        name: build_reward(reward) for name, reward in config.evaluation.rewards.items()
    }
    k, n = config.evaluation.k, config.target_n
    for name in names:
        if name == BASE:
            model, tokenizer = base, base_tokenizer
        else:
            model, tokenizer = load_policy(
                str(folder.model(name)),
                revision=config.model.revision,  # of an adapter's base
                dtype=config.model.dtype,
                device=config.model.device,
                trust_remote_code=config.model.trust_remote_code,
            )
        draws = k + n if name == BASE else k
        settings = config.sampling.model_copy(update={"n": draws, "seed": config.evaluation.seed})
        _draw_for_evaluation(folder, name, model, tokenizer, rows, settings)
        _measure(folder, name, model, base, rewards)
        folder.finish(f"evaluate-{name}", len(shard_paths(folder.evaluation / name)))
        del model  # before the next one is loaded


def _evaluation_settings(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json") | _score_settings(config)
    values["evaluation"] = config.evaluation.model_dump(mode="json")
    if config.evaluation.prompts is not None:
        values["evaluation"]["prompts"]["content"] = file_digest(config.evaluation.prompts.path)
    return values


def _drawn(folder: RunFolder, name: str) -> Path:
    return folder.evaluation / f"{name}-samples"


def _draw_for_evaluation(
    folder: RunFolder,
    name: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    settings: SamplingConfig,
) -> None:
    # A stream of its own for each model: draws that share their random numbers would be correlated.
    sampler = TransformersSampler(model, tokenizer, settings, stream=name)
    provenance = _provenance(folder.config) | {
        "model": folder.config.model.name if name == BASE else name,
        "sampling": settings.model_dump(mode="json"),
    }
    title = f"{name}: sampling"
    _sample_shards(sampler, sampler.encode(rows), _drawn(folder, name), provenance, title)


def _measure(
    folder: RunFolder,
    name: str,
    model: PreTrainedModel,
    base: PreTrainedModel,
    rewards: dict[str, Reward],
) -> None:
    """Rewards, further rewards and KL of every drawn shard, into `evaluation/NAME/`."""
    config = folder.config

    def measured(shard: Groups) -> list[Group]:
        groups = list(shard)
        for key, reward in rewards.items():
            pairs = zip(groups, score_groups(reward, groups), strict=True)
            groups = [g.with_metric(key, s) if key else g.with_rewards(s) for g, s in pairs]
        if name == BASE:
            return groups
        kls = completion_kls(
            model,
            base,
            groups,
            temperature=config.sampling.temperature,
            max_batch_tokens=config.evaluation.max_batch_tokens,
        )
        return [group.with_metric("kl", kl) for group, kl in zip(groups, kls, strict=True)]

    described = {"reward": _described(config.reward)}
    title = f"{name}: measuring"
    _each_shard(_drawn(folder, name), folder.evaluation / name, measured, described, title)


def _write_evaluation(
    folder: RunFolder, results: dict[str, ModelEvaluation], prompts: int, seen: int
) -> None:
    from bonbon.plots import plot_win_rate_against_kl

    config = folder.config
    write_json(
        folder.evaluation / "evaluation.json",
        {
            "n": config.target_n,
            "k": config.evaluation.k,
            "prompts": prompts,
            "prompts_trained_on": seen,
            "base_model": config.model.name,
            "reward": _described(config.reward),
            # With top-k or top-p the supports differ and the KL of the cut distributions can be
            # infinite, so it is that of the models at the sampling temperature.
            "kl_of": "models at the temperature" if config.sampling.truncates else "sampled policy",
            "models": {name: result.to_json() for name, result in results.items()},
        },
    )
    plot_win_rate_against_kl(results, config.target_n, folder.evaluation / "win_rate_kl.png")
    for name in config.trainings:
        record = read_json(folder.model(name) / "training_log.json")
        card = model_card(config, name, results, prompts, record)
        write_text(folder.model(name) / "README.md", card)


# --- all of them ----------------------------------------------------------------------------------


def run(folder: RunFolder) -> dict[str, ModelEvaluation]:
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
