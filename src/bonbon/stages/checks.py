"""Check what a configuration's own model cannot: names that higher floors give a meaning to.

Called at the start of every command and stage that takes a run's configuration, before anything
costly. Loads no torch unless `train.arguments` names fields of transformers.
"""

from __future__ import annotations

from bonbon.config.run import RunConfig
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.system.errors import BonbonError


def check_config(config: RunConfig) -> None:
    """Check the names of objectives, metrics and arguments of the trainer.

    Raises BonbonError naming the wrong key and what was expected.
    """
    for name, settings in config.trainings.items():
        if settings.objective not in OBJECTIVES:
            section = "train" if settings is config.train else f"baselines.{name}"
            raise BonbonError(
                f"{section}.objective = {settings.objective!r}: unknown objective; choose one of "
                f"{', '.join(OBJECTIVES)}"
            )
    _check_truncation(config)
    _check_metrics(config)
    if any(settings.arguments.model_extra for settings in config.trainings.values()):
        from bonbon.training.from_config import check_arguments

        check_arguments(config)


def _check_truncation(config: RunConfig) -> None:
    """Refuse objectives that would compare the policy with another distribution than its own."""
    if not config.sampling.truncates:
        return
    for settings in config.trainings.values():
        if OBJECTIVES[settings.objective].compares:
            others = " or ".join(name for name, it in OBJECTIVES.items() if not it.compares)
            raise BonbonError(
                "sampling.top_k and top_p cut the distribution that objective "
                f"{settings.objective} compares the policy with; leave them out, or train with "
                f"{others} alone"
            )


def _check_metrics(config: RunConfig) -> None:
    if not config.evaluation.metrics:
        return
    from bonbon.evaluation.drift import COMPLETION_METRICS, GROUP_METRICS

    for name in config.evaluation.metrics:
        if name in COMPLETION_METRICS or name in GROUP_METRICS:
            raise BonbonError(
                f"evaluation.metrics: {name!r} is measured anyway; call yours something else"
            )
