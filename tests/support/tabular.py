"""Minimise an objective on a policy that is a table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Loss = Callable[[torch.Tensor], torch.Tensor]


def minimise(loss: Loss, start: Floats, precision: float = 1e-13) -> Floats:
    """Gradient descent (LBFGS) on the logits of a softmax policy; returns its probabilities.

    `loss` maps the outcomes' log-probabilities, shape (N,), to a scalar; steps that lower it by
    less than `precision` end the descent.
    """
    logits = torch.tensor(np.log(start), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, history_size=50, tolerance_grad=1e-9, tolerance_change=precision,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(dim=0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(dim=0).numpy()
