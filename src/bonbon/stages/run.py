"""A whole run: sample → score → train → evaluate, each one folder in and one folder out.

Every stage can be stopped at any time, and the same call resumes it. A finished shard, model or
evaluation is never made twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bonbon.evaluation.results import Evaluation
from bonbon.runs.fingerprints import rounds_settings
from bonbon.runs.run_folder import RunFolder
from bonbon.stages.checks import check_config
from bonbon.stages.engine import do_stages
from bonbon.stages.evaluate import evaluate
from bonbon.stages.sample import begin_sampling, sample
from bonbon.stages.score import begin_scoring, score
from bonbon.stages.train import check_trainings, train
from bonbon.system.atomic_files import atomic_folder


def sample_and_score(folder: RunFolder) -> None:
    """Sample and score: one after the other, or at the same time where the engine can do both."""
    if folder.config.engine.name == "local":
        folder.check_data("score")
        sample(folder)
        score(folder)
        return
    with folder.data_locked():
        todo = [begin_sampling(folder), begin_scoring(folder)]
        do_stages(
            folder, [name for name, left in zip(("sample", "score"), todo, strict=True) if left]
        )


def run(folder: RunFolder) -> Evaluation:
    """Run all stages, from prompts to the evaluation, with `rounds` of the first three."""
    check_config(folder.config)
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
    folder.notes.refuse("compare", what="a comparison")
    folder.notes.refuse("generate", what="answers of `bonbon generate`")
    steps = folder.rounds()
    if not any(step.has_trained(name) for step in steps for name in step.config.trainings):
        folder.notes.forget("rounds")  # so that a training that failed at once can be changed
    folder.notes.begin("rounds", rounds_settings(config, folder.rows))
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
