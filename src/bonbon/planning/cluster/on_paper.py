"""Estimates for models on accelerators: memory, tokens a second, FLOPs.

Pure functions of a model's shape and an accelerator's peaks. Each estimate depends on a
*utilisation*, the fraction of a peak that is reached. The caller states it; a measurement is
better. Sizes are bytes (1 GB = 10^9), times are seconds, FLOPs count a multiplication and an
addition as two. Attention's own FLOPs and the network between GPUs are left out. Loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from bonbon.config.settings import Settings

Method = Literal["full", "lora", "qlora"]

BF16 = 2.0  # bytes a number
# Bytes a weight: four bits, an 8-bit scale for each block of 64 weights, and a float32 scale for
# each 256 of these (bitsandbytes with double quantisation).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
FP32 = 4.0
# A float32 weight and its gradient, and AdamW's two moments.
ADAMW = 16.0


class ModelShape(Settings):
    """A Llama-like model; the names are those of its config.json."""

    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    tie_word_embeddings: bool = False


class Accelerator(Settings):
    """A GPU's peaks, as its vendor states them."""

    memory_gb: float = Field(gt=0)
    bandwidth_gb_per_second: float = Field(gt=0, description="of its memory")
    tflops: float = Field(gt=0, description="dense, bfloat16, without sparsity")


@dataclass(frozen=True)
class DecodeSpeed:
    """The speed of decoding: a step of b rows takes fixed + b · per_row seconds for b tokens."""

    fixed: float
    per_row: float

    def step_seconds(self, rows: int) -> float:
        """Return the seconds of a step of `rows` rows."""
        return self.fixed + rows * self.per_row

    def tokens_per_second(self, rows: int) -> float:
        """Return the tokens a second while `rows` rows are decoded together."""
        return rows / self.step_seconds(rows)


# --- sizes ----------------------------------------------------------------------------------------


def _linear_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """Return (in, out) of each linear layer of one block: q, k, v, o, gate, up, down."""
    wide = shape.num_attention_heads * shape.head_dim
    narrow = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    attention = [(hidden, wide), (hidden, narrow), (hidden, narrow), (wide, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def parameter_count(shape: ModelShape) -> int:
    """Count all weights: embeddings, output head, blocks and their two norms, the last norm."""
    block = sum(a * b for a, b in _linear_sizes(shape)) + 2 * shape.hidden_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return embeddings + shape.num_hidden_layers * block + shape.hidden_size


def lora_parameter_count(shape: ModelShape, r: int) -> int:
    """Count the weights of a rank-r adapter on all linear layers but the head (`all-linear`)."""
    return shape.num_hidden_layers * sum(r * (a + b) for a, b in _linear_sizes(shape))


def weight_bytes(shape: ModelShape, bytes_per_weight: float = BF16) -> float:
    """Return the bytes of all weights."""
    return parameter_count(shape) * bytes_per_weight


def kv_bytes_per_token(shape: ModelShape, bytes_per_number: float = BF16) -> float:
    """Return the bytes of one token's keys and values: 2 · layers · kv heads · head dim · bytes."""
    heads = shape.num_key_value_heads * shape.head_dim
    return 2 * shape.num_hidden_layers * heads * bytes_per_number


def rows_that_fit(
    shape: ModelShape,
    gpu: Accelerator,
    gpus: float,
    tokens: float,
    share: float = 0.9,
) -> int:
    """Return how many rows of `tokens` tokens fit: their KV cache and the bfloat16 weights.

    `share` is the share of the memory that they may take. Prompts are counted in every row; vLLM
    keeps a prompt that rows share only once. Below 1 where the weights alone do not fit.
    """
    free = gpus * gpu.memory_gb * 1e9 * share - weight_bytes(shape)
    return math.floor(free / (kv_bytes_per_token(shape) * tokens))


# --- sampling and scoring -------------------------------------------------------------------------


def decode_speed(
    shape: ModelShape,
    gpu: Accelerator,
    gpus: float,
    rows: int,
    context: float,
    utilisation: float = 1.0,
) -> DecodeSpeed:
    """Estimate how fast one copy of the model on `gpus` GPUs decodes.

    A step reads all weights once for all rows, and each row's keys and values of `context` tokens
    (the mean over its steps). The matrix products take the longer of two times: that of reading the
    weights, and that of 2 · parameters · rows FLOPs. `utilisation` is of bandwidth and FLOPs; 1
    gives the least time of any engine without quantisation or speculation.
    """
    bandwidth = gpus * gpu.bandwidth_gb_per_second * 1e9 * utilisation
    flops = gpus * gpu.tflops * 1e12 * utilisation
    products = max(weight_bytes(shape) / bandwidth, forward_flops(shape, rows) / flops)
    return DecodeSpeed(products, kv_bytes_per_token(shape) * context / bandwidth)


def forward_flops(shape: ModelShape, tokens: float) -> float:
    """Return the FLOPs of a forward pass: 2 · parameters a token."""
    return 2.0 * parameter_count(shape) * tokens


def forward_tokens_per_second(
    shape: ModelShape, gpu: Accelerator, gpus: float, utilisation: float
) -> float:
    """Return the tokens a second of forward passes: prefill, rewards or log-probabilities."""
    return gpus * gpu.tflops * 1e12 * utilisation / forward_flops(shape, 1)


# --- training -------------------------------------------------------------------------------------


def training_flops(
    shape: ModelShape, tokens: float, method: Method = "full", checkpointing: bool = True
) -> float:
    """Return the FLOPs of forward and backward passes.

    2 · parameters a token forward, 2 for the gradients of activations, 2 for those of weights
    (an adapter's are left out), and 2 for the second forward pass of gradient checkpointing.
    """
    passes = 2 + (method == "full") + checkpointing
    return passes * forward_flops(shape, tokens)


def training_state_bytes(shape: ModelShape, method: Method = "full", r: int = 16) -> float:
    """Return the bytes of weights, gradients and AdamW's moments, over all GPUs together.

    full: 16 bytes a weight, all float32. lora: bfloat16 weights (`train.dtype`), and 16 bytes for
    each of the adapter's. qlora: nf4 weights, float32 embeddings, head and norms (as peft prepares
    them), and the same adapter.
    """
    if method == "full":
        return parameter_count(shape) * ADAMW
    adapter = lora_parameter_count(shape, r) * ADAMW
    if method == "lora":
        return weight_bytes(shape) + adapter
    linear = shape.num_hidden_layers * sum(a * b for a, b in _linear_sizes(shape))
    return linear * NF4 + (parameter_count(shape) - linear) * FP32 + adapter


def checkpoint_bytes(shape: ModelShape, tokens: float) -> float:
    """Return the bytes that gradient checkpointing keeps of a pass: each block's bfloat16 input.

    Recomputing one block, gathering its weights, and 64 MiB chunks of logits need more memory.
    """
    return BF16 * shape.num_hidden_layers * shape.hidden_size * tokens


def hours_at(flops: float, gpu: Accelerator, gpus: float, utilisation: float) -> float:
    """Return the hours of `flops` on `gpus` GPUs at a fraction of their peak."""
    return flops / (gpus * gpu.tflops * 1e12 * utilisation) / 3600
