"""BoNBoN fine-tuning: `BoNBoNConfig` and `BoNBoNTrainer`, used the way TRL's trainers are.

    groups = read_groups("run/groups")
    trainer = BoNBoNTrainer("model", BoNBoNConfig("out"), train_dataset=groups)
    trainer.train()

The base model's log-probabilities are in the groups, so no reference model is held in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.batching import PaddedRows, pad_rows
from bonbon.errors import BonbonError
from bonbon.groups import Group
from bonbon.logprobs import (
    SharedPromptRows,
    completion_log_probs,
    shared_prompt_log_probs,
    shared_prompt_rows,
    supports_shared_prompt,
)
from bonbon.models import load_policy
from bonbon.objectives import (
    OBJECTIVES,
    PAPER_ALPHA,
    ObjectiveSettings,
    PairLogps,
    pair_metrics,
)
from bonbon.selection import Pair, Selection, select_pairs


@dataclass
class BoNBoNConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what the objectives need.

    The batch size counts groups. `n` is read from the groups and checked against them when given.
    """

    learning_rate: float = field(
        default=5e-7, metadata={"help": "The paper's, for 2.8 B parameters; small models want more"}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "The paper's clipping norm"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Groups are not columns"})
    objective: str = field(default="bonbon", metadata={"help": f"One of {', '.join(OBJECTIVES)}"})
    n: int | None = field(default=None, metadata={"help": "n of best-of-n; None: the groups'"})
    alpha: float = field(
        default=PAPER_ALPHA, metadata={"help": "Weight of the SFT part in bonbon and bonbon_dpo"}
    )
    beta: float = field(default=0.1, metadata={"help": "β of the dpo and ipo baselines"})
    temperature: float | None = field(
        default=None,
        metadata={"help": "The temperature the groups were drawn at; None: the groups', else 1"},
    )
    share_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the prompt once for best and worst. None: where the model allows it "
            "and a prompt is at least half as long as the completions, from where on it pays"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise BonbonError(
                f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}"
            )
        if not 0 <= self.alpha <= 1:
            raise BonbonError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not self.beta > 0:
            raise BonbonError(f"beta must be positive, got {self.beta}")


@dataclass(frozen=True)
class PairCollator:
    """Pairs to tensors; a batch of B pairs has B rows (shared prompt) or B × segments rows.

    Every tensor's first dimension is the pair, so that a batch can be split between devices.
    """

    pad_id: int
    uses_worst: bool
    share_prompt: bool | None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        prompts = [pair.prompt_token_ids for pair in pairs]
        segments = [[pair.best for pair in pairs]]
        if self.uses_worst:
            segments.append([pair.worst for pair in pairs])
        batch = {
            "ref_best": torch.tensor([pair.ref_best for pair in pairs]),
            "ref_worst": torch.tensor([pair.ref_worst for pair in pairs]),
        }
        if self.uses_worst and self._shares(prompts, segments):
            shared = shared_prompt_rows(prompts, segments, self.pad_id)
            return batch | {
                "input_ids": shared.input_ids,
                "mask": shared.mask,
                "position_ids": shared.position_ids,
                "width": torch.full((len(pairs),), shared.width),
            }
        rows = pad_rows(
            prompts * len(segments), [row for segment in segments for row in segment], self.pad_id
        )
        # (segments · B, columns) becomes (B, segments, columns).
        return batch | {
            name: value.view(len(segments), len(pairs), -1).transpose(0, 1).contiguous()
            for name, value in vars(rows).items()
        }

    def _shares(
        self, prompts: Sequence[Sequence[int]], segments: Sequence[Sequence[Sequence[int]]]
    ) -> bool:
        if self.share_prompt is not None:
            return self.share_prompt
        longest = max(len(row) for segment in segments for row in segment)
        return 2 * max(map(len, prompts)) >= longest  # measured: benchmarks/shared_prompt.py


class BoNBoNTrainer(Trainer):
    """Fine-tunes a policy towards best-of-n from scored groups.

    Args:
        model: a causal language model, or the name of one.
        args: the settings; see `BoNBoNConfig`.
        train_dataset: groups: `bonbon.Groups`, any sequence of `Group`, or a `datasets.Dataset` of
            their rows. Groups whose best and worst rewards tie carry no preference: they are
            dropped, and counted in `self.selection.tied`.
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
        self.temperature = _temperature(args, train_dataset)
        self.selection = _select(train_dataset)
        held_out = _select(eval_dataset)
        self.n = _common_n(args.n, self.selection, held_out)
        share = args.share_prompt
        if not supports_shared_prompt(model):
            if share:
                raise BonbonError(
                    "share_prompt needs a model with position ids, sdpa or eager attention and no "
                    "sliding window; set share_prompt to false"
                )
            share = False
        pad_id = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(pad_id or 0, self.objective.uses_worst, share),
            train_dataset=self.selection.pairs if self.selection else None,
            eval_dataset=held_out.pairs if held_out else None,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        # The loss is a plain mean over groups, so gradient accumulation divides by its steps.
        self.model_accepts_loss_kwargs = False
        self._settings = ObjectiveSettings(n=self.n or 0, alpha=args.alpha, beta=args.beta)
        self._metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def pair_logps(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> PairLogps:
        """The summed log-probabilities of a collated batch's completions, each (groups,)."""
        temperature = self.temperature
        if "width" in batch:
            shared = SharedPromptRows(
                batch["input_ids"],
                batch["mask"],
                batch["position_ids"],
                completions=2,
                width=int(batch["width"][0]),
            )
            dtype = next(model.parameters()).dtype
            best, worst = shared_prompt_log_probs(model, shared, dtype, temperature)
            return PairLogps(best, batch["ref_best"], worst, batch["ref_worst"])
        names = PaddedRows.__dataclass_fields__
        rows = PaddedRows(**{name: batch[name].flatten(0, 1) for name in names})
        sums = completion_log_probs(model, rows, temperature)
        best, *rest = sums.view(len(batch["ref_best"]), -1).unbind(dim=1)
        if not rest:
            return PairLogps(best, batch["ref_best"])
        return PairLogps(best, batch["ref_best"], rest[0], batch["ref_worst"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's mean over the batch's groups."""
        logps = self.pair_logps(model, inputs)
        loss = self.objective.loss(logps, self._settings).mean()
        with torch.no_grad():
            mode = self._metrics["train" if model.training else "eval"]
            for name, values in pair_metrics(logps, self._settings.n).items():
                mode[name].append(float(values.mean()))
        return (loss, dict(vars(logps))) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
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


def _temperature(args: BoNBoNConfig, dataset: Any) -> float:
    """The temperature of the groups' log-probabilities, which the policy's must share."""
    drawn = getattr(dataset, "provenance", {}).get("sampling", {})
    if (drawn.get("top_k", 0) or drawn.get("top_p", 1) < 1) and args.objective != "sft_bon":
        raise BonbonError(
            "the groups were drawn with top-k or top-p, so their log-probabilities are those of a "
            f"cut distribution that the policy does not have; objective {args.objective} compares "
            "the two: draw without, or train with objective sft_bon"
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
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _select(dataset: Any) -> Selection | None:
    if dataset is None:
        return None
    groups = [row if isinstance(row, Group) else Group.from_row(row) for row in dataset]
    return select_pairs(groups)


def _common_n(asked: int | None, *selections: Selection | None) -> int | None:
    found = {selection.n for selection in selections if selection is not None}
    if asked is not None:
        found.add(asked)
    if len(found) > 1:
        raise BonbonError(
            f"the groups and the settings disagree on n: {sorted(found)}; the target of best "
            "against worst is that of the n the pair was chosen from"
        )
    return next(iter(found), None)
