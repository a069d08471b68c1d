"""BoNBoN fine-tuning: `BoNBoNConfig` and `BoNBoNTrainer`, used the way TRL's trainers are.

    groups = read_groups("run/groups")
    trainer = BoNBoNTrainer("model", BoNBoNConfig("out"), train_dataset=groups)
    trainer.train()

The base model's log-probabilities are in the groups, so no reference model is held in memory.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.batching import token_batches
from bonbon.config import LARGEST_N, SamplingConfig
from bonbon.decoding.catalogue import check_independent
from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.kl_budget import KLBudgetCallback, KLMeter, base_of
from bonbon.logprobs import GroupRows, group_log_probs, group_rows, supports_shared_prompt
from bonbon.models import load_policy
from bonbon.objectives import (
    OBJECTIVES,
    PAPER_ALPHA,
    GroupLogps,
    ObjectiveSettings,
    group_metrics,
)
from bonbon.prompts import EncodedPrompt
from bonbon.selection import Select, SelectedGroup, Selection, select_groups
from bonbon.tilt import TILTS


@dataclass
class BoNBoNConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what the objectives need.

    The batch size counts groups, each with all the completions that the objective uses.
    """

    learning_rate: float = field(
        default=5e-7, metadata={"help": "The paper's, for 2.8 B parameters; small models want more"}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "The paper's clipping norm"})
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Off: processes may need different numbers of forward passes"},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are not columns"})
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


@dataclass(frozen=True)
class GroupCollator:
    """A batch of groups to tensors, in parts of like length within `max_batch_tokens`.

    `share` of a part is its share of the batch's groups, so that the parts' losses, each a mean,
    add up to the batch's mean whatever the parts are. `groups`, their order in the batch, comes
    first because accelerate reads a batch's size off its first tensor.
    """

    pad_id: int
    max_batch_tokens: int

    def __call__(self, groups: Sequence[SelectedGroup]) -> dict[str, Any]:
        # With the longest prompt of all, so that no padding takes a part over the limit.
        prompt = max(len(group.prompt_token_ids) for group in groups)
        lengths = [
            len(group.completions) * (prompt + max(map(len, group.completions))) for group in groups
        ]
        parts = list(token_batches(groups, lengths, self.max_batch_tokens))
        return {
            "groups": torch.tensor([index for part in parts for index in part]),
            "parts": [self._part([groups[i] for i in part], len(groups)) for part in parts],
        }

    def _part(self, groups: Sequence[SelectedGroup], total: int) -> dict[str, torch.Tensor]:
        rows = group_rows(
            [group.prompt_token_ids for group in groups],
            [group.completions for group in groups],
            self.pad_id,
        )
        return vars(rows) | {
            "ref_logps": torch.tensor([group.ref_logps for group in groups]),
            # In double precision, or rewards that differ in the last digits would tie.
            "rewards": torch.tensor([group.rewards for group in groups], dtype=torch.float64),
            "share": torch.tensor(len(groups) / total),
        }


class BoNBoNTrainer(Trainer):
    """Fine-tunes a policy towards best-of-n from scored groups.

    Args:
        model: a causal language model, or the name of one.
        args: the settings; see `BoNBoNConfig`.
        train_dataset: groups: `bonbon.Groups`, any sequence of `Group`, or a `datasets.Dataset` of
            their rows. Groups whose rewards all tie carry no preference: they are dropped, and
            counted in `self.selection.tied`.
        eval_dataset: held-out groups for the evaluation loss (and early stopping).
        processing_class: the model's tokenizer (for the padding token, and saved with the model).
        peft_config: train an adapter instead of all weights.

    The other arguments are those of `transformers.Trainer`. Raises BonbonError for groups that
    cannot be trained on.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: BoNBoNConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or BoNBoNConfig("bonbon-trainer")
        if isinstance(model, str):
            model, tokenizer = load_policy(model, dtype="float32", device="cpu")
            processing_class = processing_class or tokenizer
        elif processing_class is None and (name := str(getattr(model, "name_or_path", "") or "")):
            processing_class = AutoTokenizer.from_pretrained(name)
        if not isinstance(model, PeftModel):  # an adapter's own dropout was asked for
            _disable_dropout(model)
        if peft_config is not None:
            try:
                model = get_peft_model(model, peft_config)
            except ValueError as error:
                raise BonbonError(f"this adapter does not fit the model: {error}") from error
        if args.gradient_checkpointing and isinstance(model, PreTrainedModel | PeftModel):
            model.enable_input_require_grads()
        self.objective = OBJECTIVES[args.objective]
        for dataset in (train_dataset, eval_dataset):
            check_independent(getattr(dataset, "provenance", {}), "train on")
        self.temperature = _temperature(args, train_dataset)
        self.selection = _select(train_dataset, self.objective.select)
        held_out = _select(eval_dataset, self.objective.select)
        self.drawn = _common_n(self.selection, held_out)
        self.n = target_n(args, self.drawn)
        self.tilt = args.tilt or self.objective.tilt
        self._shares = supports_shared_prompt(model)
        if args.share_prompt and not self._shares:
            raise BonbonError(
                "share_prompt needs a model with position ids and attention layers alone, without "
                "gradient checkpointing; set share_prompt to false"
            )
        if args.kl_budget is not None:
            chosen = held_out or self.selection
            meter = self._kl_meter(
                model, processing_class, args, chosen, _drawn_with(train_dataset)
            )
            callbacks = [
                *(callbacks or []),
                KLBudgetCallback(meter, args.kl_budget, model),
            ]
        pad_id = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(pad_id or 0, args.max_batch_tokens or _pass_tokens(args)),
            train_dataset=self.selection.groups if self.selection else None,
            eval_dataset=held_out.groups if held_out else None,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if args.kl_budget is not None:
                raise BonbonError(
                    "kl_budget needs each process to hold whole weights; leave it out"
                )
            # Every forward pass gathers the weights, so all processes must do as many: one.
            self.data_collator = GroupCollator(pad_id or 0, sys.maxsize)
        # The loss is a plain mean over groups, so gradient accumulation divides by its steps.
        self.model_accepts_loss_kwargs = False
        self._settings = ObjectiveSettings(
            n=self.drawn or 0,
            tilt=TILTS[self.tilt](self.n or 1),
            alpha=args.alpha,
            beta=args.beta,
            delta=args.delta,
        )
        self._metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def _kl_meter(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        args: BoNBoNConfig,
        chosen: Selection | None,
        drawn: Mapping[str, Any],
    ) -> KLMeter:
        if tokenizer is None or chosen is None:
            raise BonbonError("kl_budget draws completions; give a processing_class and groups")
        longest = max(len(ids) for group in chosen.groups for ids in group.completions)
        step = max(1, len(chosen.groups) // args.kl_prompts)
        prompts = [
            EncodedPrompt(group.prompt_id, "", group.prompt_token_ids)
            for group in chosen.groups[::step][: args.kl_prompts]
        ]
        config = SamplingConfig(
            n=args.kl_samples,
            max_new_tokens=drawn.get("max_new_tokens", longest),
            temperature=self.temperature,
            top_k=drawn.get("top_k", 0),
            top_p=drawn.get("top_p", 1.0),
            seed=args.seed,
        )
        return KLMeter(base_of(model), tokenizer, prompts, config)

    def group_logps(self, model: nn.Module, part: Mapping[str, torch.Tensor]) -> GroupLogps:
        """The summed log-probabilities of a collated part's completions."""
        rows = GroupRows(**{name: part[name] for name in GroupRows.__dataclass_fields__})
        asked = self.args.share_prompt
        share = self._shares and (sharing_pays(rows) if asked is None else asked)
        # Sharded weights are gathered again for the gradient of a layer's output, not of its cache;
        # and the trainer turns on gradient checkpointing only once it has been built.
        share = share and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        share = share and supports_shared_prompt(model)
        logps = group_log_probs(model, rows, self.temperature, share)
        return GroupLogps(logps, part["ref_logps"], part["rewards"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's mean over a batch's groups, or its `share` of the mean for one part."""
        if "parts" in inputs:
            losses = [self.compute_loss(model, part) for part in inputs["parts"]]
            loss = torch.stack(losses).sum()
            return (loss, {}) if return_outputs else loss
        logps = self.group_logps(model, inputs)
        with torch.no_grad():
            mode = self._metrics["train" if model.training else "eval"]
            for name, values in group_metrics(logps).items():
                mode[name] += values.tolist()
        return self.objective.loss(logps, self._settings).mean() * inputs["share"]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass a part: never more than a part's activations are held."""
        *parts, last = inputs["parts"]
        loss = 0.0
        for part in parts:
            # Processes may have different numbers of parts, so only the last one synchronises.
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        return loss + super().training_step(model, last, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss on held-out groups; there are no labels to return."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, averaged since the last log, to what is logged."""
        evaluating = "eval_loss" in logs
        mode = self._metrics["eval" if evaluating else "train"]
        prefix = "eval_" if evaluating else ""
        logs |= {f"{prefix}{name}": sum(v) / len(v) for name, v in mode.items()}
        mode.clear()
        super().log(logs, start_time)


def _drawn_with(dataset: Any) -> Mapping[str, Any]:
    """The sampling settings that groups were drawn with; empty where they do not say."""
    settings: Mapping[str, Any] = getattr(dataset, "provenance", {}).get("sampling", {})
    return settings


def _temperature(args: BoNBoNConfig, dataset: Any) -> float:
    """The temperature of the groups' log-probabilities, which the policy's must share."""
    drawn = _drawn_with(dataset)
    if (drawn.get("top_k", 0) or drawn.get("top_p", 1) < 1) and OBJECTIVES[args.objective].compares:
        raise BonbonError(
            "the groups were drawn with top-k or top-p, so their log-probabilities are those of a "
            f"cut distribution that the policy does not have; objective {args.objective} compares "
            "the two: draw without, or train with objective sft_bon or weighted_sft"
        )
    asked, found = args.temperature, drawn.get("temperature")
    if asked is not None and found is not None and asked != found:
        raise BonbonError(
            f"the groups were drawn at temperature {found}, not {asked}; leave it out"
        )
    return float(next((t for t in (asked, found) if t is not None), 1.0))


def _disable_dropout(model: nn.Module) -> None:
    """Without it the policy is the base model at the first step, as the objectives suppose."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):  # of functional dropout
                setattr(module, name, 0.0)


def _pass_tokens(args: BoNBoNConfig) -> int:
    """A CPU is fastest while a pass fits its caches; elsewhere memory is what counts."""
    return 4096 if args.device.type == "cpu" else 32_768


def sharing_pays(rows: GroupRows) -> bool:
    """Whether computing the prompt once is the faster way: where it saves a quarter of the tokens.

    So `benchmarks/training_step.py` has it, and about from there on it takes less memory too. A
    second, short forward pass has a price of its own.
    """
    _, m, width = rows.completion_ids.shape
    prompt = rows.prompt_ids.shape[1]
    return 4 * (m - 1) * prompt >= m * (prompt + width)


def _select(dataset: Any, select: Select) -> Selection | None:
    if dataset is None:
        return None
    groups = [row if isinstance(row, Group) else Group.from_row(row) for row in dataset]
    return select_groups(groups, select)


def _common_n(*selections: Selection | None) -> int | None:
    found = {selection.n for selection in selections if selection is not None}
    if len(found) > 1:
        raise BonbonError(
            f"the training and the evaluation groups differ in n: {sorted(found)}; draw as many "
            "completions for both"
        )
    return next(iter(found), None)


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
