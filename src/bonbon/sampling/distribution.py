"""Next-token distributions: temperature, top-k and top-p, and draws from them."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bonbon.config.sampling import SamplingConfig
from bonbon.models.forward import full_precision
from bonbon.system.errors import BonbonError

# Neighbouring tokens in a block; first a block is drawn, then a token in it.
_CDF_BLOCK = 128


def warped_log_probs(
    logits: torch.Tensor, config: SamplingConfig, drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute next-token log-probabilities under the sampling settings, (rows, vocabulary), nats.

    In float32, or in float64 for float64 logits. `drawn`, (rows,), are tokens known to be within
    top-k and top-p, which are kept: recomputed in 16 bits in another batch, the set may lack one.
    """
    scores = full_precision(logits)
    warpers = LogitsProcessorList()
    if config.temperature != 1:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    warped = warpers(None, scores)
    if drawn is not None and config.truncates:
        kept = scores.gather(-1, drawn[:, None]) / config.temperature
        warped = warped.scatter(-1, drawn[:, None], kept.to(warped.dtype))
    return warped.log_softmax(dim=-1)


def draw_tokens(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Compute the inverse CDF of each row of `log_probs` (rows, vocabulary) at `uniforms` (rows,).

    It looks up the block of tokens first, then the token in it: a float64 CDF of a whole vocabulary
    takes up to a tenth of the forward pass's time. Raises BonbonError for NaN probabilities.
    """
    rows, vocabulary = log_probs.shape
    weights = log_probs.new_zeros(rows, -(-vocabulary // _CDF_BLOCK) * _CDF_BLOCK)
    torch.exp(log_probs, out=weights[:, :vocabulary])
    blocks = weights.view(rows, -1, _CDF_BLOCK)
    block, rest = _inverse_cdf(blocks.sum(dim=-1), uniforms)
    token, _ = _inverse_cdf(blocks[torch.arange(rows, device=block.device), block], rest)
    return block * _CDF_BLOCK + token


def _inverse_cdf(
    weights: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of `weights` (rows, k) each uniform falls on, and where in it, in [0, 1]."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    if not bool(total.isfinite().all()):
        raise BonbonError(
            "the model's next-token probabilities are not finite; its weights overflow in this "
            "dtype (try model.dtype=float32), or the sampling temperature is too small"
        )
    # Kept below the total despite rounding, or a last token of probability 0 could be drawn.
    target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target, right=True)
    end = cdf.gather(-1, index)
    start = torch.where(index > 0, cdf.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(-1), ((target - start) / (end - start)).squeeze(-1)
