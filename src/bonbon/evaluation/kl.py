"""Estimates of the KL divergence between two language models, in nats a completion.

KL(p ‖ q) is estimated from completions drawn from p. Each of three estimates is a sum over a
completion's steps t (the step of a drawn end token included), with p and q given the drawn prefix:

| estimate | term | bias | variance |
|---|---|---|---|
| `rao_blackwellised` | Σ_v p(v) ln p(v)/q(v), exact over the vocabulary | none | least in practice; never below 0 |
| `plain` | ln p(y_t)/q(y_t) | none | largest for close models; can be negative |
| `k3` | q(y_t)/p(y_t) − 1 − ln q(y_t)/p(y_t) | none where p can draw all that q can, else low | between them for close models; never below 0 |

All three agree on average: given the prefix, the mean of a step's term is the step's exact KL
(Schulman 2020, "Approximating KL divergence", for k3; Amini, Vieira, Cotterell 2025, arXiv
2504.10637, for the Rao-Blackwellised one). k3's variance explodes where q(y_t)/p(y_t) does, that
is, where the models are far apart. For single steps the variance of rao_blackwellised is provably
at most that of plain. Over whole completions it is not, since an early step's log-ratio can cancel
later steps' KL, but it is for all but contrived models. The Rao-Blackwellised estimate is the
default everywhere.

KL(model ‖ base) is estimated from the model's completions, KL(base ‖ model) from the base's.
"""  # noqa: E501 (a table row cannot be broken)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.models.forward import last_logits
from bonbon.models.loading import forward_batch_tokens
from bonbon.models.padding import pad_rows, token_batches
from bonbon.sampling.distribution import warped_log_probs

# At most this many logits of one model are held at once while KLs are computed (1 GiB in float32).
_LOGITS = 2**28


@dataclass(frozen=True)
class CompletionKLs:
    """The three KL estimates along each completion of a group, in nats; tuples of length n."""

    rao_blackwellised: tuple[float, ...]
    plain: tuple[float, ...]
    k3: tuple[float, ...]


ESTIMATES = ("rao_blackwellised", "plain", "k3")


@torch.inference_mode()
def completion_kls(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    groups: Sequence[Group],
    *,
    sampling: SamplingConfig | None = None,
    base_sampling: SamplingConfig | None = None,
    max_batch_tokens: int | None = None,
) -> list[CompletionKLs]:
    """Estimate KL(policy ‖ base) along each completion that was drawn from the policy.

    For KL(base ‖ policy) swap the two and use the base's completions.

    Args:
        groups: the policy's completions; both models read their token ids, so their vocabularies
            have to be the same. If one head is wider (padded), both are cut to the narrower.
        sampling: the policy's sampling settings; None: temperature 1.
        base_sampling: the base's; None: the policy's. If the policy can draw tokens that the base
            cannot (top-k, top-p), the KL is infinite.
        max_batch_tokens: padded tokens a pass; None: by the device.
    """
    own = sampling or SamplingConfig()
    settings = (own, base_sampling or own)
    rows = [
        (index, k, group.prompt_token_ids, ids)
        for index, group in enumerate(groups)
        for k, ids in enumerate(group.token_ids)
    ]
    kls = [{name: [0.0] * group.n for name in ESTIMATES} for group in groups]
    lengths = [len(prompt) + len(ids) for _, _, prompt, ids in rows]
    max_tokens = whole_logits_batch_tokens(policy, max_batch_tokens)
    for batch in token_batches(rows, lengths, max_tokens):
        chosen = [rows[index] for index in batch]
        sums = _row_kls((policy, base), settings, chosen)
        for name, values in sums.items():
            for (index, k, _, _), value in zip(chosen, values, strict=True):
                kls[index][name][k] = value
    return [CompletionKLs(**{name: tuple(v) for name, v in group.items()}) for group in kls]


def whole_logits_batch_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Return the padded tokens of a pass that holds all logits of the vocabulary at once."""
    return min(forward_batch_tokens(asked, model.device), _LOGITS // vocabulary_size(model))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the width of a model's head; its tokenizer may use less."""
    return int(model.config.get_text_config().vocab_size)


def _row_kls(
    models: tuple[PreTrainedModel, PreTrainedModel],
    settings: tuple[SamplingConfig, SamplingConfig],
    rows: Sequence[Any],
) -> dict[str, list[float]]:
    """Compute each estimate, summed along each row."""
    padded = pad_rows([row[2] for row in rows], [row[3] for row in rows], 0)
    mask = padded.completion_mask.bool()
    width = mask.shape[1]
    drawn = padded.completion_ids[mask]
    vocabulary = min(vocabulary_size(model) for model in models)
    log_probs: list[torch.Tensor] = []
    for model, sampling in zip(models, settings, strict=True):
        logits = last_logits(
            model,
            width + 1,
            input_ids=padded.input_ids.to(model.device),
            attention_mask=padded.attention_mask.to(model.device),
            position_ids=padded.position_ids.to(model.device),
            use_cache=False,
        )[:, :-1][mask.to(model.device)]  # completions' steps: (steps, vocabulary)
        by_policy = None if log_probs else drawn.to(model.device)
        log_probs.append(warped_log_probs(logits[:, :vocabulary], sampling, by_policy))
    ours, theirs = log_probs[0], log_probs[1].to(log_probs[0].device)
    sums = {}
    for name, steps in _step_kls(ours, theirs, drawn.to(ours.device)).items():
        by_row = torch.zeros(mask.shape, dtype=torch.float64)
        by_row[mask] = steps.double().cpu()
        sums[name] = [float(kl) for kl in by_row.sum(dim=-1)]
    return sums


def _step_kls(
    ours: torch.Tensor, theirs: torch.Tensor, drawn: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """Compute each estimate at each step, from log-probabilities (steps, vocabulary)."""
    # A token that the policy cannot draw adds nothing, whatever its log-ratio.
    terms = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0)
    ratio = (ours - theirs).gather(-1, drawn[:, None]).squeeze(-1)  # ln p/q of the drawn token
    return {
        "rao_blackwellised": terms.sum(dim=-1).clamp(min=0),  # rounding may give less than 0
        "plain": ratio,
        "k3": (-ratio).expm1() + ratio,
    }
