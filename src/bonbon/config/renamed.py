"""Settings that were moved or removed, and today's keys for them.

One table serves errors (in a user's file an old key is refused, and the new one named), the
configurations in the folders of older runs (which are read as if written today), and the notes of
older runs (`bonbon.config.notes`). Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from bonbon.config.fields import settings_classes

# Of each class of settings: the old key, and its new place below the same section.
MOVED: dict[str, dict[str, str]] = {
    "TrainConfig": {
        name: f"arguments.{name}"
        for name in (
            "adam_beta2", "weight_decay", "max_grad_norm", "delta", "share_prompt",
            "max_batch_tokens",
        )
    },
    "ServerSettings": {name: f"client.{name}" for name in ("timeout", "deadline", "retries")},
    "JudgeConfig": {name: f"client.{name}" for name in ("timeout", "retries")},
}  # fmt: skip

# Of each class of settings: the old key, and why it is no longer needed.
REMOVED: dict[str, dict[str, str]] = {
    "VllmSettings": {
        "data_parallel_size": "vLLM's offline engine runs one copy of a model; have several "
        "samplers (engine: ray), or put a server behind sampler: openai (`vllm serve "
        "--data-parallel-size`)"
    },
}


def what_became_of(kind: type[BaseModel], key: str) -> str | None:
    """Say in a sentence where a dotted key of this class went; None for one that never existed."""
    section, dot, name = key.rpartition(".")
    new, reason = _of(kind, MOVED).get(name), _of(kind, REMOVED).get(name)
    if new is not None:
        return f"{key} is now {section}{dot}{new}"
    return None if reason is None else f"{key} was removed: {reason}"


def upgraded(values: Any, kind: type[BaseModel]) -> Any:
    """Return plain values of an older configuration of this class under today's keys."""
    if not isinstance(values, Mapping):
        return values
    gone = {*_of(kind, MOVED), *_of(kind, REMOVED)}
    changed = {key: value for key, value in values.items() if key not in gone}
    for key in changed:
        for inner, is_named in _inner(kind, key):
            changed[key] = _each(changed[key], inner, is_named)
    for old, new in _of(kind, MOVED).items():
        if old in values:
            section, _, name = new.partition(".")
            changed[section] = {name: values[old], **(changed.get(section) or {})}
    return changed


def _of(kind: type[BaseModel], table: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The entries of a class and of those that it is made from."""
    entries: dict[str, str] = {}
    for parent in kind.__mro__:
        entries |= table.get(parent.__name__, {})
    return entries


def _inner(kind: type[BaseModel], key: str) -> list[tuple[type[BaseModel], bool]]:
    """The classes of settings that a key holds, and whether they stand there by name."""
    field = kind.model_fields.get(key)
    if field is None:
        return []
    by_name = get_origin(field.annotation) is dict
    return [(inner, by_name) for inner in settings_classes(field.annotation)]


def _each(value: Any, kind: type[BaseModel], by_name: bool) -> Any:
    if isinstance(value, list):
        return [upgraded(item, kind) for item in value]
    if by_name and isinstance(value, Mapping):
        return {name: upgraded(item, kind) for name, item in value.items()}
    return upgraded(value, kind)
