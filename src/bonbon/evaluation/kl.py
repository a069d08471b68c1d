"""KL divergences between two language models, in nats a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from bonbon.batching import pad_rows, token_batches
from bonbon.groups import Group
from bonbon.logprobs import full_precision, last_logits
from bonbon.models import forward_batch_tokens

# At most this many logits of one model are held at once while KLs are computed (1 GiB in float32).
_LOGITS = 2**28


@torch.inference_mode()
def completion_kls(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    max_batch_tokens: int | None = None,
) -> list[tuple[float, ...]]:
    """Σ_t KL(π(· | x, y_<t) ‖ π0(· | x, y_<t)) along each of the policy's completions, in nats.

    The mean over completions drawn from the policy is an unbiased, Rao-Blackwellised estimate of
    KL(π ‖ π0): the exact KL over the vocabulary at every drawn prefix, a drawn end token's step
    included. It cannot be negative.
    """
    rows = [
        (index, k, group.prompt_token_ids, ids)
        for index, group in enumerate(groups)
        for k, ids in enumerate(group.token_ids)
    ]
    kls = [[0.0] * group.n for group in groups]
    lengths = [len(prompt) + len(ids) for _, _, prompt, ids in rows]
    # Both models' logits over the whole vocabulary are held at once.
    max_tokens = min(
        forward_batch_tokens(max_batch_tokens, policy.device),
        _LOGITS // policy.config.get_text_config().vocab_size,
    )
    for batch in token_batches(rows, lengths, max_tokens):
        chosen = [rows[index] for index in batch]
        for (index, k, _, _), kl in zip(
            chosen, _row_kls(policy, base, chosen, temperature), strict=True
        ):
            kls[index][k] = kl
    return [tuple(values) for values in kls]


def _row_kls(
    policy: PreTrainedModel, base: PreTrainedModel, rows: Sequence[Any], temperature: float
) -> list[float]:
    padded = pad_rows([row[2] for row in rows], [row[3] for row in rows], 0)
    width = padded.completion_mask.shape[1]
    log_probs = []
    for model in (policy, base):
        logits = last_logits(
            model,
            width + 1,
            input_ids=padded.input_ids.to(model.device),
            attention_mask=padded.attention_mask.to(model.device),
            position_ids=padded.position_ids.to(model.device),
            use_cache=False,
        )[:, :-1]
        log_probs.append((full_precision(logits) / temperature).log_softmax(dim=-1))
    ours, theirs = log_probs[0], log_probs[1].to(log_probs[0].device)
    # A token that the policy cannot draw adds nothing, whatever its log-ratio.
    terms = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0)
    steps = terms.sum(dim=-1).double().clamp(min=0).cpu()  # the last bits may fall below 0
    return [float(kl) for kl in (steps * padded.completion_mask).sum(dim=-1)]
