"""`BoNBoNConfig`: how to train, what `TrainingArguments` are to transformers' `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from bonbon.config.settings import Settings, parse_settings
from bonbon.config.training import ArgumentsOfARun, TrainConfig, TrainerArguments
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.system.errors import BonbonError
from bonbon.tilt.catalogue import TILTS


def _setting(kind: type[Settings], name: str, names: str = "") -> Any:
    """The dataclass field of a setting, with the default and the explanation that it has there."""
    own = kind.model_fields[name]
    explanation = f"{own.description} One of {names}." if names else own.description
    return field(default=own.default, metadata={"help": explanation, "setting of": kind})


@dataclass
class BoNBoNConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what the objectives need.

    The batch size counts groups, each with all the completions that the objective uses. Several
    processes, as `torchrun` or `accelerate launch` start them, share each batch's groups. Raises
    BonbonError for a value out of its range.
    """

    learning_rate: float = _setting(TrainConfig, "learning_rate")
    adam_beta2: float = _setting(TrainerArguments, "adam_beta2")
    weight_decay: float = _setting(TrainerArguments, "weight_decay")
    max_grad_norm: float = _setting(TrainerArguments, "max_grad_norm")
    logging_steps: float = _setting(TrainerArguments, "logging_steps")
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Off: a language model's buffers do not change"}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite ends the training"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are not columns"})
    global_batch_size: int | None = _setting(ArgumentsOfARun, "global_batch_size")
    objective: str = _setting(TrainConfig, "objective", ", ".join(OBJECTIVES))
    tilt: str | None = _setting(TrainConfig, "tilt", ", ".join(TILTS))
    n: float | None = _setting(TrainConfig, "n")
    alpha: float = _setting(TrainConfig, "alpha")
    beta: float = _setting(TrainConfig, "beta")
    delta: float = _setting(TrainerArguments, "delta")
    temperature: float | None = _setting(ArgumentsOfARun, "temperature")
    share_prompt: bool | None = _setting(TrainerArguments, "share_prompt")
    logprobs: str | None = _setting(TrainConfig, "logprobs")
    max_batch_tokens: int | None = _setting(TrainerArguments, "max_batch_tokens")
    kl_budget: float | None = _setting(TrainConfig, "kl_budget")
    kl_prompts: int = _setting(TrainerArguments, "kl_prompts")
    kl_samples: int = _setting(TrainerArguments, "kl_samples")

    def __post_init__(self) -> None:
        if torch.accelerator.current_accelerator(check_available=True) is None:
            self.use_cpu = True  # or several processes would each train the whole model alone
        super().__post_init__()
        check_objective(self.objective)
        for kind in (TrainConfig, TrainerArguments, ArgumentsOfARun):
            own = [it.name for it in fields(self) if it.metadata.get("setting of") is kind]
            parse_settings(kind, {name: getattr(self, name) for name in own}, (), "BoNBoNConfig")


def check_objective(name: str) -> None:
    """Raise BonbonError with the names of the objectives where this is none of them."""
    if name not in OBJECTIVES:
        raise BonbonError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")


def target_n(args: BoNBoNConfig, drawn: int | None) -> float | None:
    """The n to aim at, given that of the draws. BonbonError when the objective cannot do it."""
    n = drawn if args.n is None else args.n
    if OBJECTIVES[args.objective].any_tilt or n is None:
        return n
    if args.tilt not in (None, "best_of_n") or (drawn is not None and n != drawn):
        free = ", ".join(name for name, other in OBJECTIVES.items() if other.any_tilt)
        raise BonbonError(
            f"objective {args.objective} aims at the best of the n drawn ({drawn}), not at n = "
            f"{n:g} of {args.tilt or 'best_of_n'}; objectives for any n and tilt are {free}"
        )
    return n
