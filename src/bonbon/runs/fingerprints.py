"""The fingerprint of each stage: the settings that its output depends on, as plain values."""

from __future__ import annotations

from typing import Any

from bonbon.config.run import RunConfig
from bonbon.rewards.identity import reward_identity
from bonbon.runs.prompts import RunPrompts
from bonbon.system.errors import BonbonError


def sample_settings(config: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Return what the draws depend on, the prompts' file by its content."""
    values = config.model_dump(mode="json", include={"model", "prompts", "sampling", "rounds"})
    values["prompts"]["content"] = prompts.digest(config.prompts.path)
    if config.evaluation.prompts is None:
        values["evaluation"] = {"holdout": config.evaluation.holdout}
    return values | sampler_settings(config)


def sampler_settings(config: RunConfig) -> dict[str, Any]:
    """The sampler; nothing for our own one, which notes of older runs do not name."""
    if config.sampler.name == "transformers":
        return {}
    return config.model_dump(mode="json", include={"sampler"})


def score_settings(config: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Return what the scored groups depend on."""
    return sample_settings(config, prompts) | {
        "reward": reward_identity(config.reward, defaults=True)
    }


def train_settings(config: RunConfig, prompts: RunPrompts, name: str) -> dict[str, Any]:
    """Return what the model of that name depends on."""
    settings = config.trainings[name].model_dump(mode="json")
    return score_settings(config, prompts) | {"train": settings}


def evaluation_settings(config: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Return what the evaluation's draws depend on; rewards and metrics can be added later."""
    values = score_settings(config, prompts)
    values["trainings"] = {
        name: it.model_dump(mode="json") for name, it in config.trainings.items()
    }
    drawing = {"prompts", "holdout", "k", "seed"}
    values["evaluation"] = config.evaluation.model_dump(mode="json", include=drawing)
    if config.evaluation.prompts is not None:
        values["evaluation"]["prompts"]["content"] = prompts.digest(config.evaluation.prompts.path)
    return values


def rounds_settings(config: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Return what a run of several rounds depends on."""
    trainings = {name: it.model_dump(mode="json") for name, it in config.trainings.items()}
    return score_settings(config, prompts) | {"trainings": trainings}


def refuse_rounds(config: RunConfig) -> None:
    """Raise BonbonError for a configuration whose stages cannot be done one by one."""
    if config.rounds > 1:
        raise BonbonError(
            f"with rounds = {config.rounds} sampling, scoring and training take turns; use "
            "`bonbon run`"
        )
