"""The model card (README.md) of a trained model: its origin, training and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bonbon.config.reward import RewardConfig
from bonbon.config.run import RunConfig

if TYPE_CHECKING:
    from bonbon.evaluation.figures import Figure
    from bonbon.evaluation.results import ModelEvaluation


def model_card(
    config: RunConfig,
    name: str,
    results: Mapping[str, ModelEvaluation],
    prompts: int,
    record: Mapping[str, Any],
) -> str:
    """Return the card in Markdown; `prompts` is the number evaluated, `record` the training log."""
    settings, sampling = config.trainings[name], config.sampling
    is_adapter = settings.lora is not None and not settings.lora.merge
    header = {
        # The hub links to it, so a local folder is left out.
        **({} if Path(config.model.name).exists() else {"base_model": config.model.name}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bonbon", "best-of-n", "alignment"],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}: {_code(config.model.name)} aligned with BoNBoN",
        "",
        f"Fine-tuned with BoNBoN's objective `{settings.objective}` on {sampling.n} scored "
        f"completions a prompt{' (a LoRA adapter)' if is_adapter else ''}.",
        "",
        "## Measured",
        "",
        f"On {prompts} held-out prompts, {config.evaluation.k} completions each; 95% intervals by "
        "bootstrap over prompts.",
        "",
        f"| figure | this model | best-of-{config.target_n} |",
        "|---|---|---|",
        *_figures(results[name], results[f"best-of-{config.target_n}"]),
        "",
        "*Recovered* is the share of best-of-n's win-rate gain; *KL efficiency* is the least KL "
        "that any rank-based tilt needs for this win rate, over the measured KL (1 is the limit).",
        "",
        "## How it was made",
        "",
        f"- base model: {_code(config.model.name)}"
        + (f", revision {_code(config.model.revision)}" if config.model.revision else ""),
        f"- reward: {_reward(config.reward)}",
        f"- sampling: temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k "
        f"{sampling.top_k or 'off'}, at most {sampling.max_new_tokens} tokens",
        f"- groups: {record['groups']}, of which {record['tied_groups_dropped']} were left out "
        "because all their rewards tied",
        f"- aim: n = {record['n']:g}, tilt `{record.get('tilt')}`"
        + (
            f", in the last of {config.rounds} rounds"
            if config.rounds > 1 and name == config.model_name
            else ""
        ),
        f"- training: {settings.optimizer}, learning rate {settings.learning_rate:g}, "
        f"{settings.epochs:g} epochs, {settings.batch_size} groups a batch, seed {settings.seed}",
    ]
    return "\n".join(lines) + "\n"


def _figures(model: ModelEvaluation, best: ModelEvaluation) -> list[str]:
    rows = [
        ("win rate against the base model", model.win_rate, best.win_rate),
        (
            "length-controlled win rate",
            model.length_controlled_win_rate,
            best.length_controlled_win_rate,
        ),
        *(
            (f"win rate by {key}", figure, best.win_rate_by[key])
            for key, figure in model.win_rate_by.items()
        ),
        ("KL from the base model (nats)", model.kl, best.kl),
        ("recovered", model.recovered, best.recovered),
        ("KL efficiency", model.kl_efficiency, best.kl_efficiency),
        ("length (tokens)", model.length, best.length),
        ("length change (tokens)", model.length_change, best.length_change),
        ("tokens drawn for an answer", model.tokens_per_answer, best.tokens_per_answer),
    ]
    return [f"| {name} | {_figure(ours)} | {_figure(theirs)} |" for name, ours, theirs in rows]


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _code(text: str | None) -> str:
    return f"`{str(text).replace('`', '')}`"


def _reward(reward: RewardConfig) -> str:
    if reward.sum:
        return " + ".join(f"{part.weight:g} × {_reward(part)}" for part in reward.sum)
    return _code(reward.model or reward.function)
