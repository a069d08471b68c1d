"""Faster linear layers for inference on CPUs with AVX-512, by oneDNN.

On x86, PyTorch gives float32 matrix products to MKL, which uses only AVX2 on AMD's processors, even
if they have AVX-512. oneDNN, which is also part of PyTorch, uses AVX-512 and is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# For smaller weights or fewer rows oneDNN is not faster.
_SMALLEST_WEIGHT = 2**14
_FEWEST_ROWS = 8


@contextmanager
def fast_linear(model: nn.Module) -> Iterator[None]:
    """Compute the model's float32 linear layers by oneDNN within the context, given AVX-512.

    For inference only: results have no gradient. Weights are not copied.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _gains(layer)]
    for layer in layers:
        layer.forward = _forward(layer)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _gains(layer: nn.Linear) -> bool:
    # Subclasses (such as quantised layers) and layers with their own forward (hooks) are unchanged.
    if type(layer) is not nn.Linear or "forward" in vars(layer) or not _available():
        return False
    weight = layer.weight
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_sparse
    return plain and weight.is_contiguous() and weight.numel() >= _SMALLEST_WEIGHT


def _available() -> bool:
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return libraries and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _forward(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias, usual = layer.weight, layer.bias, layer.forward

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype != torch.float32 or inputs.numel() < _FEWEST_ROWS * weight.shape[1]:
            return usual(inputs)
        # The operation that torch.compile uses for such a layer.
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    return forward
