"""Facts about how groups were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bonbon.system.errors import BonbonError

# For groups older than the entry `independent`: strategies whose draws depend on rewards.
_STEERING = frozenset({"speculative_rejection", "tree_bon", "smc", "adaptive_n"})


def check_independent(provenance: Mapping[str, Any], purpose: str) -> None:
    """Raise BonbonError for completions that are not independent draws of the base model."""
    strategy = (provenance.get("strategy") or {}).get("name")
    if not provenance.get("independent", strategy not in _STEERING):
        raise BonbonError(
            f"the groups were made by strategy {strategy}, which steers what is drawn, so "
            f"that their ranks are not those of the base model's draws; {purpose} groups of "
            "`bonbon sample`, or of a strategy such as best_of_n"
        )


def drawn_with(dataset: Any) -> Mapping[str, Any]:
    """Return the sampling settings that groups were drawn with; empty where they are not known."""
    settings: Mapping[str, Any] = getattr(dataset, "provenance", {}).get("sampling", {})
    return settings
