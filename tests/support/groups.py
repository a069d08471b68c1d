"""Groups made up for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bonbon.groups.group import Group, Groups, Prompt
from support.models import (
    BOS,
    EOS,
)

if TYPE_CHECKING:
    pass

MakeGroup = Callable[..., Group]


def group_of(
    prompt_id: str = "p0",
    prompt: Prompt = "Once upon a time",
    completions: Sequence[str] = (" there was", " a cat", ""),
    **changes: Any,
) -> Group:
    """A group whose other columns are made up to fit its completions."""
    n = len(completions)
    values: dict[str, Any] = {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "prompt_token_ids": (BOS, 10, 11),
        "completions": tuple(completions),
        "token_ids": tuple((*range(20, 20 + k), EOS) for k in range(n)),
        "logprobs": tuple(-1.5 * (k + 1) for k in range(n)),
        "finish_reasons": ("stop",) * n,
    }
    return Group(**(values | changes))


def assert_same_groups(found: Groups, expected: Groups) -> None:
    """The same draws and rewards; log-probabilities as near as batches allow."""
    assert [g.prompt_id for g in found] == [g.prompt_id for g in expected]
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert [g.rewards for g in found] == [g.rewards for g in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)
