"""A stage of a run: where its shards come from and go to, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stage that makes shards of `output` from those of `source`.

    `builds_on` is the stage that writes `source`. `fingerprint` gives the settings that the output
    depends on, as plain values.
    """

    name: str
    builds_on: str
    source: Path
    output: Path
    fingerprint: Callable[[], Mapping[str, Any]]
