"""The stages of a run: sample → score → train → evaluate, each one folder in and one folder out.

Every stage can be stopped at any time and is gone on with by the same call; a finished shard, model
or evaluation is never made twice. `run` does them all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from bonbon.config import ModelConfig, RayEngineConfig
from bonbon.errors import BonbonError
from bonbon.evaluation.measuring import BASE, Policy
from bonbon.evaluation.results import Evaluation
from bonbon.evaluation.stage import evaluate_policies, write_evaluation
from bonbon.files import atomic_folder, read_json, write_text
from bonbon.groups import read_groups
from bonbon.model_card import model_card
from bonbon.run_folder import RunFolder
from bonbon.sampling import iter_encoded
from bonbon.stage_settings import (
    evaluation_settings,
    refuse_rounds,
    rounds_settings,
    sample_settings,
    score_settings,
    train_settings,
)
from bonbon.stages import (
    evaluation_prompts,
    named_tokenizer,
    trained_on,
    training_prompts,
    work_here,
    write_prompts,
)
from bonbon.training import check_trainings
from bonbon.training import train as train

# --- sample ---------------------------------------------------------------------------------------


def sample(folder: RunFolder) -> None:
    """Draw n completions of every training prompt into `samples/`."""
    with folder.data_locked():
        if _begin_sampling(folder):
            _work(folder, ["sample"])


def _begin_sampling(folder: RunFolder) -> bool:
    """Check what can be checked, and write the prompts; whether there is something to draw."""
    config = folder.config
    refuse_rounds(config)
    folder.refuse("compare", what="a comparison")
    folder.refuse("generate", what="answers of `bonbon generate`")
    folder.begin_data("sample", sample_settings(config))
    if folder.is_finished("sample", folder.samples):
        return False
    if not folder.store.is_finished("prompts", folder.prompts):
        tokenizer, context = named_tokenizer(config.model, config.sampler)
        prompts = iter_encoded(
            training_prompts(config),
            tokenizer,
            max_tokens=None if context is None else context - config.sampling.max_new_tokens,
            on_long_prompt=config.sampling.on_long_prompt,
        )
        shards = write_prompts(prompts, folder.prompts, config.sampling.shard_size)
        folder.store.finish("prompts", shards)
    return True


# --- score ----------------------------------------------------------------------------------------


def score(folder: RunFolder) -> None:
    """Score every sampled shard into `groups/`.

    An engine with workers for both stages does what is left of the sampling too.
    """
    if folder.config.engine.name != "local":
        sample_and_score(folder)
        return
    with folder.data_locked():
        if not _begin_scoring(folder):
            return
        if not folder.is_finished("sample", folder.samples):
            raise BonbonError(
                f"{folder.samples} is not complete; run `bonbon sample` to the end first"
            )
        _work(folder, ["score"])


def _begin_scoring(folder: RunFolder) -> bool:
    """Check what can be checked; whether there is something to score."""
    refuse_rounds(folder.config)
    folder.begin_data("score", score_settings(folder.config))
    return not folder.is_finished("score", folder.groups)


# --- sample and score -----------------------------------------------------------------------------


def sample_and_score(folder: RunFolder) -> None:
    """Both stages: one after the other, or both at a time where the engine has workers for each."""
    if folder.config.engine.name == "local":
        sample(folder)
        score(folder)
        return
    with folder.data_locked():
        todo = [_begin_sampling(folder), _begin_scoring(folder)]
        _work(folder, [name for name, left in zip(("sample", "score"), todo, strict=True) if left])


def _work(folder: RunFolder, stages: Sequence[str]) -> None:
    """Do stages by the configured engine, and note that they are finished."""
    if isinstance(folder.config.engine, RayEngineConfig):
        from bonbon.cluster.pipeline import work_on_cluster

        work_on_cluster(folder, stages, folder.config.engine)
    else:
        for stage in stages:
            work_here(folder, stage)
    for stage in stages:
        folder.finish_data(stage)


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
            folder.compare(folder.training(name), train_settings(config, name))
    if config.rounds > 1:
        folder.compare("rounds", rounds_settings(config))
    folder.begin("evaluate", evaluation_settings(config))
    rows = evaluation_prompts(config)
    known = trained_on(config, {json.dumps(row.prompt) for row in rows})
    evaluation = evaluate_policies(folder, _policies(folder), rows)
    seen = sum(json.dumps(it.prompt) in known for it in read_groups(folder.evaluation / BASE))
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


# --- all of them ----------------------------------------------------------------------------------


def run(folder: RunFolder) -> Evaluation:
    """All stages, from prompts to the evaluation, with `rounds` of the first three."""
    if folder.config.rounds > 1:
        _run_rounds(folder)
        return evaluate(folder)
    check_trainings(folder)
    sample_and_score(folder)
    train(folder)
    return evaluate(folder)


def _run_rounds(folder: RunFolder) -> None:
    """Rounds of sample, score and train, each in a run folder `round-R/`; then the models."""
    config = folder.config
    folder.refuse("compare", what="a comparison")
    folder.refuse("generate", what="answers of `bonbon generate`")
    steps = folder.rounds()
    if not any(step.has_trained(name) for step in steps for name in step.config.trainings):
        folder.forget("rounds")  # so that a training that failed at once can be changed
    folder.begin("rounds", rounds_settings(config))
    check_trainings(steps[0])
    for step in steps:
        sample_and_score(step)
        train(step)
    for name in config.trainings:
        _publish(steps[-1 if name == config.model_name else 0].model(name), folder.model(name))


def _publish(source: Path, target: Path) -> None:
    """Put a round's model where a run's model lies, whole or not at all."""
    if not target.exists():
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary)
