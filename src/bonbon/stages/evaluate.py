"""The stage that measures, judges and compares policies, and writes the results."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.config.evaluation import JudgeConfig
from bonbon.config.sampling import ModelConfig
from bonbon.evaluation.drift import metrics_for
from bonbon.evaluation.efficiency import ROUNDING
from bonbon.evaluation.evaluator import Evaluator
from bonbon.evaluation.group_values import best_draw
from bonbon.evaluation.human_text import TextLosses, bits_per_byte, forgetting, perplexity
from bonbon.evaluation.judge import Comparison, judge_comparisons
from bonbon.evaluation.results import Draws, Evaluation, HumanText, JudgeFigures, ModelEvaluation
from bonbon.evaluation.win_rates import win_rate_figure
from bonbon.groups.group import Group
from bonbon.groups.shards import shard_paths
from bonbon.report.model_card import model_card
from bonbon.rewards.identity import reward_provenance, without_digests
from bonbon.runs.fingerprints import (
    evaluation_settings,
    rounds_settings,
    train_settings,
)
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import spent
from bonbon.stages.checks import check_config
from bonbon.stages.measure import BASE, Measured, Policy, measure_policies
from bonbon.stages.train import train as train
from bonbon.system.atomic_files import read_json, write_json, write_text
from bonbon.system.errors import BonbonError
from bonbon.system.progress import progress_bar

SCHEMA_VERSION = 2


def evaluation_of(folder: RunFolder, measured: Mapping[str, Measured]) -> Evaluation:
    """Judge and compare measured policies, the base model first.

    Raises BonbonError when the judge fails; judgements made before are kept.
    """
    measured = _on_common_prompts(measured)
    config = folder.config.evaluation
    evaluator = Evaluator(
        measured[BASE].draws.groups,
        folder.config.target_n,
        config.k,
        config.bootstrap,
        tuple(config.rewards),
        tuple(config.metrics),
    )
    draws = {name: it.draws for name, it in measured.items() if name != BASE}
    models = _models(evaluator, draws)
    models = _with_length_control(evaluator, models, draws)
    equal = _equal_win_rate(models)
    if equal is not None:
        models = _with_drift_at(evaluator, models, draws, equal)
    if config.judge is not None:
        models = _with_judge(folder, config.judge, evaluator, models, draws)
    models = {name: _with_texts(it, measured, name) for name, it in models.items()}
    n = evaluator.n
    return Evaluation(
        n=n,
        k=config.k,
        prompts=len(evaluator.base),
        models=models,
        best_of_k=evaluator.best_of_k(beyond=(2 * n, 4 * n, 8 * n)),
        best_of_n_kl=evaluator.best_of_n_kl(),
        pairs=evaluator.pairs(draws),
        equal_win_rate=equal,
    )


def _on_common_prompts(measured: Mapping[str, Measured]) -> dict[str, Measured]:
    """Keep the draws for the prompts that all policies have.

    With `on_long_prompt: skip` a prompt can be too long for only one model's tokenizer.
    """
    ids = [[group.prompt_id for group in it.draws.groups] for it in measured.values()]
    common = set.intersection(*map(set, ids))
    if not common:
        raise BonbonError("no prompt is short enough for all of the policies")
    return {name: replace(it, draws=it.draws.on_prompts(common)) for name, it in measured.items()}


Models = dict[str, ModelEvaluation]


def _best_of_n(evaluator: Evaluator) -> str:
    return f"best-of-{evaluator.n}"


def _models(evaluator: Evaluator, draws: Mapping[str, Draws]) -> Models:
    return {
        BASE: evaluator.base_model(),
        _best_of_n(evaluator): evaluator.best_of_n(),
        **{name: evaluator.model(it) for name, it in draws.items()},
    }


def _with_length_control(
    evaluator: Evaluator, models: Models, draws: Mapping[str, Draws]
) -> Models:
    all_draws = {_best_of_n(evaluator): evaluator.best_of_n_draws, **draws}
    controlled = evaluator.length_controlled(all_draws)
    return models | {
        name: replace(models[name], length_controlled_win_rate=figure)
        for name, figure in controlled.items()
    }


def _equal_win_rate(models: Models) -> float | None:
    """Return the least win rate of the policies that win with confidence; None for fewer than 2."""
    gains = [it.win_rate.value for it in models.values() if it.win_rate.low > 0.5 + ROUNDING]
    return min(gains) if len(gains) > 1 else None


def _with_drift_at(
    evaluator: Evaluator, models: Models, draws: Mapping[str, Draws], win_rate: float
) -> Models:
    best = _best_of_n(evaluator)
    drifts = {best: evaluator.best_of_n_drift_at(win_rate)} | {
        name: evaluator.drift_at(it, win_rate) for name, it in draws.items()
    }
    return models | {
        name: replace(models[name], drift_at_equal_win_rate=drift) for name, drift in drifts.items()
    }


def _with_texts(
    model: ModelEvaluation, measured: Mapping[str, Measured], name: str
) -> ModelEvaluation:
    """Add the figures of human text and tasks, where they were asked for."""
    if name not in measured:
        return model
    base, own = measured[BASE], measured[name]
    return replace(
        model,
        human_text=_human_text(base.losses, own.losses),
        tasks=_task_rows(base.tasks, own.tasks),
    )


def _human_text(before: TextLosses | None, after: TextLosses | None) -> HumanText | None:
    if before is None or after is None:
        return None
    comparable = np.array_equal(after.tokens, before.tokens)
    return HumanText(
        perplexity(after), bits_per_byte(after), forgetting(after, before) if comparable else None
    )


def _task_rows(
    before: Sequence[dict[str, Any]] | None, after: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    """Return the results as plain values, each with its change from the base model's."""
    if before is None or after is None:
        return None
    from bonbon.evaluation.lm_eval import TaskResult, task_changes

    results = [[TaskResult.from_json(row) for row in rows] for rows in (before, after)]
    changes = [
        {"change": change.change, "change_low": change.low, "change_high": change.high}
        for change in task_changes(*results)
    ]
    return [
        row | {key: value if _is_finite(value) else None for key, value in change.items()}
        for row, change in zip(after, changes, strict=True)
    ]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# --- the judge ------------------------------------------------------------------------------------


def _with_judge(
    folder: RunFolder,
    judge: JudgeConfig,
    evaluator: Evaluator,
    models: Models,
    draws: Mapping[str, Draws],
) -> Models:
    all_draws = {_best_of_n(evaluator): evaluator.best_of_n_draws, **draws}
    pairs = min(judge.pairs, evaluator.k)
    judged = {}
    for name, it in all_draws.items():
        comparisons = [
            Comparison(base.prompt_id, base.prompt, draw, text, base.completions[draw])
            for base, group in zip(evaluator.base, it.groups, strict=True)
            for draw, text in enumerate(_answers(group, it.best_of, pairs))
        ]
        judged[name] = _judged(folder, judge, name, comparisons)
    return models | {name: replace(models[name], judge=it) for name, it in judged.items()}


def _answers(group: Group, best_of: int, pairs: int) -> Sequence[str]:
    if best_of == 1:
        return group.completions[:pairs]
    return best_draw(group, best_of).completions * pairs


def _judged(
    folder: RunFolder, judge: JudgeConfig, name: str, comparisons: Sequence[Comparison]
) -> JudgeFigures:
    path = folder.evaluation / f"judgements-{re.sub(r'[^A-Za-z0-9]+', '-', judge.model)}.parquet"
    with progress_bar(f"{name}: judging", 2 * len(comparisons), "requests") as bar:
        preferences = judge_comparisons(judge, comparisons, path, bar.advance)
    by_prompt: dict[str, list[float]] = {}
    for comparison, preference in zip(comparisons, preferences, strict=True):
        if np.isfinite(preference):
            by_prompt.setdefault(comparison.prompt_id, []).append(preference)
    means = np.array([np.mean(values) for values in by_prompt.values()])
    return JudgeFigures(
        win_rate=win_rate_figure(means, folder.config.evaluation.bootstrap) if len(means) else None,
        comparisons=len(comparisons),
        unreadable=int(np.sum(~np.isfinite(preferences))),
    )


# --- writing --------------------------------------------------------------------------------------


def write_evaluation(folder: RunFolder, evaluation: Evaluation, about: Mapping[str, Any]) -> None:
    """Write `evaluation/evaluation.json`.

    `about` has the values specific to a run or a comparison: `main`, the main model of a run, how
    many prompts were trained on, a comparison's policies as the user wrote them. `config.yaml` is
    written again: rewards and metrics may have been added since the draws.
    """
    config = folder.config
    metrics = {
        name: {"label": metric.label, "unit": metric.unit}
        for name, metric in metrics_for(evaluation.k).items()
    } | {name: {"label": name, "unit": ""} for name in config.evaluation.metrics}
    write_json(
        folder.evaluation / "evaluation.json",
        {
            "schema_version": SCHEMA_VERSION,
            "base_model": config.model.name,
            "reward": reward_provenance(config.reward),
            # With top-k or top-p the KL of the truncated distributions can be infinite, so it is
            # that of the models at the sampling temperature.
            "kl_of": "models at the temperature" if config.sampling.truncates else "sampled policy",
            **about,
            **evaluation.to_json(),
            "metrics": metrics,
            "cost": _cost(folder, evaluation.models),
        },
    )
    folder.notes.write_config()


def _cost(folder: RunFolder, policies: Collection[str]) -> dict[str, Any]:
    """Sum the tokens drawn and seconds spent; None where a stage did not record them."""
    parts = folder.rounds()
    endings = ("", "-samples", "-forward")
    places = [folder.evaluation / f"{name}{ending}" for name in policies for ending in endings]
    measured = [path for path in places if path.is_dir()]
    samples = [path for path in measured if path.name.endswith("-samples")]
    cost: dict[str, Any] = {
        "evaluation": {
            "tokens": spent(samples)["tokens"],
            "seconds": spent(measured)["seconds"],
        }
    }
    if not all(shard_paths(part.samples) for part in parts):
        return cost
    logs = {
        name: [path / "training_log.json" for path in _models_of(name, parts)]
        for name in folder.config.trainings
    }
    return cost | {
        "sampling": spent([part.samples for part in parts]),
        "scoring": {"seconds": spent([part.groups for part in parts])["seconds"]},
        "training": {
            name: {"seconds": sum(read_json(path)["seconds"] for path in paths)}
            for name, paths in logs.items()
        },
    }


def _models_of(name: str, parts: Sequence[RunFolder]) -> list[Path]:
    """Return the folders of the model of that name, in the rounds that trained it."""
    return [part.model(name) for part in parts if part.model(name).is_dir()]


def evaluate(folder: RunFolder) -> Evaluation:
    """Sample, score and measure the base model and every trained one on the held-out prompts.

    Writes `evaluation/evaluation.json` and each trained model's card.
    """
    config = folder.config
    check_config(config)
    for name in config.trainings:
        if not folder.model(name).exists():
            command = "train" if config.rounds == 1 else "run"
            raise BonbonError(f"{folder.model(name)} does not exist; run `bonbon {command}` first")
        if config.rounds == 1:
            settings = train_settings(config, folder.rows, name)
            folder.notes.compare(folder.training(name), without_digests(settings))
    if config.rounds > 1:
        folder.notes.compare("rounds", without_digests(rounds_settings(config, folder.rows)))
    # A reward that was edited is measured again, as others that are added later.
    folder.notes.begin("evaluate", without_digests(evaluation_settings(config, folder.rows)))
    rows = folder.rows.evaluation()
    measured = measure_policies(folder, _policies(folder), rows)
    seen = folder.rows.trained_on(group.prompt for group in measured[BASE].draws.groups)
    evaluation = evaluation_of(folder, measured)
    about = {
        "main": config.model_name,
        "prompts_trained_on": int(seen.sum()),
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
