"""The contract of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow


class Sampler(Protocol):
    """Anything that turns prompts into groups of `config.n` completions."""

    config: SamplingConfig

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """The prompts as the model reads them. Raises BonbonError as `encode_prompts` does."""
        ...

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """One group a prompt, in the order of `prompts`.

        `progress` is called with the number of tokens drawn since its last call.
        """
        ...

    def described(self) -> dict[str, Any]:
        """Plain values that say what drew, for the provenance of the groups."""
        ...

    def close(self) -> None:
        """Let go of what it holds: an engine, its processes, its connections."""
        ...
