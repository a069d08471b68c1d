"""The contract of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow


class Sampler(Protocol):
    """An object that draws groups of `config.n` completions for prompts."""

    config: SamplingConfig

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """Encode prompts as the model reads them. Raises BonbonError as `iter_encoded` does."""
        ...

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """Draw one group for each prompt, in the order of `prompts`.

        `progress` is called with the number of tokens drawn since its last call.
        """
        ...

    def described(self) -> dict[str, Any]:
        """Return plain values that describe the sampler, for the groups' provenance."""
        ...

    def close(self) -> None:
        """Close what it holds: an engine, its processes, its connections."""
        ...
