"""`BoNBoNConfig`: how to train, what `TrainingArguments` are to transformers' `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from bonbon.config.training import LARGEST_N
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.objectives.pairs import PAPER_ALPHA
from bonbon.system.errors import BonbonError
from bonbon.tilt.catalogue import TILTS


@dataclass
class BoNBoNConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what the objectives need.

    The batch size counts groups, each with all the completions that the objective uses. Several
    processes, as `torchrun` or `accelerate launch` start them, share each batch's groups.
    """

    learning_rate: float = field(
        default=5e-7, metadata={"help": "The paper's, for 2.8 B parameters; small models want more"}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "The paper's clipping norm"})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Off: a language model's buffers do not change"}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite ends the training"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are not columns"})
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Groups a batch over all processes, which get as equal shares as can be. None: "
            "per_device_train_batch_size for each process"
        },
    )
    objective: str = field(
        default="rank_regression", metadata={"help": f"One of {', '.join(OBJECTIVES)}"}
    )
    tilt: str | None = field(
        default=None,
        metadata={
            "help": f"What objectives of all ranks aim at: one of {', '.join(TILTS)}. None: "
            "optimal (best-of-n's win rate at the least KL), best_of_n for weighted_sft"
        },
    )
    n: float | None = field(
        default=None,
        metadata={"help": "The n aimed at, None: as many as the groups hold"},
    )
    alpha: float = field(
        default=PAPER_ALPHA, metadata={"help": "Weight of the SFT part in bonbon and its relatives"}
    )
    beta: float = field(default=0.1, metadata={"help": "β of the dpo and ipo baselines"})
    delta: float = field(default=4.0, metadata={"help": "Huber's δ of rank_regression_huber, nats"})
    temperature: float | None = field(
        default=None,
        metadata={"help": "The temperature the groups were drawn at; None: the groups', else 1"},
    )
    share_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Compute a prompt once for all its completions. None: where the model allows "
            "it and it pays"
        },
    )
    logprobs: str | None = field(
        default=None,
        metadata={
            "help": "The base model's log-probabilities: recompute (before the first step) or "
            "sampled (those of the groups). None: recompute where another engine drew or the "
            "weights are quantised"
        },
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a forward pass: a batch of more is done in parts of like "
            "length, with the same gradient. None: 4,096 on a CPU, 32,768 elsewhere"
        },
    )

    kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "Take the trained weights back towards the base model until their measured KL "
            "from it is within this many nats a completion"
        },
    )
    kl_prompts: int = field(default=64, metadata={"help": "Prompts that the KL is measured on"})
    kl_samples: int = field(default=4, metadata={"help": "Completions drawn of each of them"})

    def __post_init__(self) -> None:
        if torch.accelerator.current_accelerator(check_available=True) is None:
            self.use_cpu = True  # or several processes would each train the whole model alone
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise BonbonError(
                f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}"
            )
        if self.tilt is not None and self.tilt not in TILTS:
            raise BonbonError(f"unknown tilt {self.tilt!r}; choose one of {', '.join(TILTS)}")
        if self.n is not None and not 1 < self.n <= LARGEST_N:
            raise BonbonError(f"n must be above 1 and at most {LARGEST_N}, got {self.n}")
        if not 0 <= self.alpha <= 1:
            raise BonbonError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not self.beta > 0:
            raise BonbonError(f"beta must be positive, got {self.beta}")
        if not self.delta > 0:
            raise BonbonError(f"delta must be positive, got {self.delta}")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise BonbonError(f"kl_budget must be positive, got {self.kl_budget}")
        if min(self.kl_prompts, self.kl_samples) < 1:
            raise BonbonError("kl_prompts and kl_samples must be at least 1")
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise BonbonError(f"max_batch_tokens must be at least 1, got {self.max_batch_tokens}")
        if self.logprobs not in (None, "recompute", "sampled"):
            raise BonbonError(f"logprobs is recompute or sampled, got {self.logprobs!r}")
        if self.global_batch_size is not None and self.global_batch_size < 1:
            raise BonbonError(f"global_batch_size must be at least 1, got {self.global_batch_size}")


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
