"""Log-probabilities of a returned completion's tokens, and of their likely alternatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.models.forward import last_logits
from bonbon.sampling.completion_text import completion_text
from bonbon.sampling.distribution import warped_log_probs
from bonbon.serve.backend import TokenLogprob

_CONTEXT = 8  # preceding tokens that a token is decoded with


@torch.inference_mode()
def completion_logprobs(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    config: SamplingConfig,
    group: Group,
    top: int,
    index: int,
) -> tuple[TokenLogprob, ...]:
    """Return ln p (nats) of each token of completion `index` under the sampling settings.

    Takes one forward pass. Each token is listed with the `top` most likely tokens in its place,
    without those that top-k or top-p cut off. The tokens of a stop string are listed, though the
    text ends before it.
    """
    prompt, ids = list(group.prompt_token_ids), list(group.token_ids[index])
    if not ids:
        return ()
    read = torch.tensor([prompt + ids[:-1]], device=model.device)
    drawn = torch.tensor(ids, device=model.device)
    logits = last_logits(model, len(ids), input_ids=read, use_cache=False)[0]
    log_probs = warped_log_probs(logits, config, drawn)
    picked = log_probs.gather(-1, drawn[:, None]).squeeze(-1).tolist()
    best = log_probs.topk(min(top, log_probs.shape[-1]), dim=-1)
    best_values, best_ids = best.values.tolist(), best.indices.tolist()
    tokens = []
    for place, (token, logprob) in enumerate(zip(ids, picked, strict=True)):
        before = (prompt + ids[:place])[-_CONTEXT:]
        others = tuple(
            (token_text(tokenizer, before, other), value)
            for other, value in zip(best_ids[place], best_values[place], strict=True)
            if math.isfinite(value)
        )
        tokens.append(TokenLogprob(token_text(tokenizer, before, token), logprob, others))
    return tuple(tokens)


def token_text(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """Return a token's text after the tokens `before` it, or a special token's name."""
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    return completion_text(tokenizer, before, [token])
