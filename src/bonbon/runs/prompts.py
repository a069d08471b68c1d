"""The prompts of a run: those to train on, and those held out for the evaluation."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bonbon.config.run import RunConfig
from bonbon.config.sampling import PromptsConfig
from bonbon.groups.group import Prompt
from bonbon.groups.prompts import PromptRow, is_held_out, iter_prompts
from bonbon.system.digests import file_digest
from bonbon.system.errors import BonbonError

_State = tuple[int, ...] | None  # of a file: when it was written, its size, its number


@dataclass(frozen=True)
class _Parsed:
    """A summary of a prompts' file that was read to its end: 8 bytes a training prompt."""

    state: _State
    held_out: list[PromptRow]
    trained_on: np.ndarray  # digests of the training prompts, uint64


class RunPrompts:
    """The prompts that a configuration names, each file read and hashed once while it is unchanged.

    The training prompts are streamed. Kept of them is a digest each, to know them again; kept whole
    are the held-out prompts alone. So what is streamed to its end for the sampling (once a round)
    needs no second reading for the evaluation.
    """

    def __init__(self, config: RunConfig) -> None:
        self._prompts = config.prompts
        self._evaluation = config.evaluation.prompts
        self._holdout = config.evaluation.holdout
        self._digests: dict[Path, tuple[_State, str]] = {}
        self._parsed: _Parsed | None = None

    def digest(self, path: Path) -> str:
        """A short hash of a file's content. Raises BonbonError when it cannot be read."""
        state = _state(path)
        known = self._digests.get(path)
        if known is None or known[0] != state or state is None:
            known = self._digests[path] = (state, file_digest(path))
        return known[1]

    def training(self) -> Iterator[PromptRow]:
        """The prompts to train on, one in memory at a time. Raises BonbonError as `iter_prompts`.

        Raises BonbonError, too, where none would be trained on or none held out.
        """
        state, held_out, digests, count = _state(self._prompts.path), [], array("Q"), 0
        for row in _rows(self._prompts):
            count += 1
            if self._evaluation is None and is_held_out(row, self._holdout):
                held_out.append(row)
            else:
                digests.append(_digest(row.prompt))
                yield row
        if self._evaluation is None and not (held_out and digests):
            raise BonbonError(
                f"{self._prompts.path}: {count} prompts are too few to hold out "
                f"{self._holdout:.0%} for the evaluation; set evaluation.prompts"
            )
        self._parsed = _Parsed(state, held_out, np.array(digests, np.uint64))

    def evaluation(self) -> list[PromptRow]:
        """The prompts to evaluate on. Raises BonbonError as `training` does."""
        if self._evaluation is not None:
            return read_configured(self._evaluation)
        return self._read().held_out

    def trained_on(self, prompts: Iterable[Prompt]) -> np.ndarray:
        """Which of some prompts are training prompts, bool. Raises BonbonError as `training`."""
        digests = np.array([_digest(prompt) for prompt in prompts], np.uint64)
        return np.isin(digests, self._read().trained_on)

    def _read(self) -> _Parsed:
        if self._parsed is None or self._parsed.state != _state(self._prompts.path):
            for _ in self.training():
                pass
        assert self._parsed is not None
        return self._parsed


def read_configured(prompts: PromptsConfig) -> list[PromptRow]:
    """The prompts of a configured file. Raises BonbonError as `iter_prompts` does."""
    return list(_rows(prompts))


def _rows(prompts: PromptsConfig) -> Iterator[PromptRow]:
    return iter_prompts(
        prompts.path, prompts.column, prompts.id_column, prompts.split, prompts.limit
    )


def _state(path: Path) -> _State:
    try:
        stat = path.stat()
    except OSError:  # reading it says so
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(prompt: Prompt) -> int:
    text = json.dumps(prompt).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
