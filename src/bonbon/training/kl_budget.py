"""A budget for a trained policy's measured KL divergence from the base model.

When training ends, the policy draws completions for a few prompts, and its KL from the base model
is measured on them as in the evaluation. If the KL exceeds the budget, the trained weights (with
an adapter, the adapter's) are moved on the straight line back to where they started, to the
farthest point within the budget. A finished training that is moved back wins more for its KL than
one that is stopped early, which still has its noise (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.evaluation import completion_kls
from bonbon.groups.prompts import EncodedPrompt
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError
from bonbon.system.processes import from_main_process
from bonbon.training.arguments import BoNBoNConfig
from bonbon.training.dataset_file import SelectedGroups

_HALVINGS = 6  # of the line to the base model: they find the farthest point to 2% of its length


@dataclass(frozen=True)
class MeasuredKL:
    """A mean KL over prompts (nats a completion) and its standard error."""

    value: float
    standard_error: float

    def within(self, budget: float) -> bool:
        """Return whether KL + two standard errors is within a budget."""
        return self.value + 2 * self.standard_error <= budget


@dataclass(frozen=True)
class KLMeter:
    """A meter of KL(policy ‖ base) on completions that the policy draws.

    Args:
        base: the base model, on the policy's device; `base_of` makes it.
        processing_class: the tokenizer, for the end tokens.
        prompts: to draw for; every measurement uses the same random numbers.
        config: the temperature, the longest completion and the completions a prompt.
    """

    base: Any
    processing_class: Tokenizer
    prompts: Sequence[EncodedPrompt]
    config: SamplingConfig

    def __call__(self, policy: Any) -> MeasuredKL:
        """Sample and measure. The policy's training mode is put back afterwards."""
        was_training = policy.training
        policy.eval()
        try:
            sampler = TransformersSampler(policy, self.processing_class, self.config, "kl-budget")
            groups = sampler.sample(self.prompts)
            sampling = SamplingConfig(temperature=self.config.temperature)
            kls = completion_kls(policy, self.base, groups, sampling=sampling)
        finally:
            policy.train(was_training)
        means = np.array([np.mean(kl.rao_blackwellised) for kl in kls])
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
        return MeasuredKL(float(means.mean()), float(error))


class _WithoutAdapter:
    """A PEFT model's base model, sharing its weights."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        with self._model.disable_adapter():
            return self._model(**inputs)


def base_of(policy: PreTrainedModel | PeftModel) -> Any:
    """Return the model that training starts from: a PEFT model without its adapter, else a copy."""
    if isinstance(policy, PeftModel):
        return _WithoutAdapter(policy)
    return copy.deepcopy(policy).eval().requires_grad_(False)


def kl_meter(
    policy: PreTrainedModel | PeftModel,
    tokenizer: Tokenizer,
    groups: SelectedGroups,
    args: BoNBoNConfig,
    temperature: float,
    drawn: Mapping[str, Any],
) -> KLMeter:
    """Build the meter of a policy that is not trained yet, from prompts spread over the groups.

    Args:
        policy: the model as training starts from it.
        tokenizer: its tokenizer.
        groups: whose prompts to draw for, `args.kl_prompts` of them or as many as there are.
        args: how much to draw.
        temperature: that of the groups' log-probabilities.
        drawn: the sampling settings that the groups were drawn with, as far as they are known.
    """
    step = max(1, len(groups) // args.kl_prompts)
    prompts = [
        EncodedPrompt(group.prompt_id, "", group.prompt_token_ids)
        for group in groups[::step][: args.kl_prompts]
    ]
    longest = int(groups.shapes[:, 2].max())
    config = SamplingConfig(
        n=args.kl_samples,
        max_new_tokens=drawn.get("max_new_tokens", longest),
        temperature=temperature,
        top_k=drawn.get("top_k", 0),
        top_p=drawn.get("top_p", 1.0),
        seed=args.seed,
    )
    return KLMeter(base_of(policy), tokenizer, prompts, config)


class KLBudgetCallback(TrainerCallback):
    """Takes the weights back at the end of training until the measured KL is within `budget`.

    `history` holds the measurements as (share of the way from the base model, KL). The trainer's
    log history has each KL as `kl`, and the share that was kept as `kl_budget_share`.
    """

    def __init__(self, meter: KLMeter, budget: float, policy: nn.Module) -> None:
        self.meter = meter
        self.budget = budget
        self.history: list[tuple[float, MeasuredKL]] = []
        self._start = _trainable(policy)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if isinstance(self.meter.base, nn.Module):
            self.meter.base.to(args.device)
        end = _trainable(model)
        start = {name: value.to(end[name].device) for name, value in self._start.items()}
        kept, beyond = 0.0, 1.0
        if self._measure(model, 1.0, state).within(self.budget):
            kept = 1.0
        for _halving in range(0 if kept else _HALVINGS):
            middle = (kept + beyond) / 2
            _interpolate(model, start, end, middle)
            if self._measure(model, middle, state).within(self.budget):
                kept = middle
            else:
                beyond = middle
        _interpolate(model, start, end, kept)
        state.log_history.append({"step": state.global_step, "kl_budget_share": kept})

    def _measure(self, model: Any, share: float, state: TrainerState) -> MeasuredKL:
        # Measured in one process: differences in the last digit could lead to other decisions.
        kl = from_main_process(lambda: self.meter(model))
        if not math.isfinite(kl.value):
            raise BonbonError(
                "the training diverged: its KL from the base model is not finite; lower "
                "learning_rate"
            )
        self.history.append((share, kl))
        state.log_history.append(
            {"step": state.global_step, "kl": kl.value, "kl_standard_error": kl.standard_error}
        )
        return kl


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


@torch.no_grad()
def _interpolate(
    model: Any, start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], share: float
) -> None:
    """Set the trainable weights to (1 − share)·start + share·end."""
    for name, value in model.named_parameters():
        if name in start:
            value.copy_(torch.lerp(start[name], end[name], share))
