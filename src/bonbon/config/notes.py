"""Settings as a run's notes hold them: flattened, and without those that cannot change a result.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from bonbon.config.fields import is_neutral, settings_classes
from bonbon.config.renamed import MOVED
from bonbon.config.run import RunConfig
from bonbon.config.settings import flatten
from bonbon.config.training import TrainConfig, TrainerArguments

# A note holds all trainings of a run as `trainings`, and a policy's model beside its own settings.
_SECTIONS: dict[str, type[BaseModel]] = {"trainings": TrainConfig}


def binding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that can change a result, flattened."""
    return {key: value for key, value in flatten(settings).items() if not _is_neutral_key(key)}


def upgraded_note(note: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flattened settings of a note, also an older run's, under today's keys.

    Arguments of a training that the note does not have are at their defaults: the note was written
    before they existed.
    """
    new: dict[str, Any] = {}
    for key, value in note.items():
        section, dot, name = key.rpartition(".")
        moved = MOVED["TrainConfig"].get(name) if f"{section}.objective" in note else None
        new[f"{section}{dot}{moved or name}"] = value
    for section in [key.removesuffix(".objective") for key in note if key.endswith(".objective")]:
        new = _argument_defaults(f"{section}.arguments") | new
    return {key: value for key, value in new.items() if not _is_neutral_key(key)}


def _argument_defaults(section: str) -> dict[str, Any]:
    values = TrainerArguments().model_dump(mode="json")
    return {f"{section}.{name}": value for name, value in values.items()}


def _is_neutral_key(key: str) -> bool:
    """Return whether a dotted key of a note leads to a setting that is marked `Neutral`."""
    first, *rest = key.split(".")
    if first in _SECTIONS:
        return _leads_to_neutral(_SECTIONS[first], rest[1:])
    return _leads_to_neutral(RunConfig, [first, *rest])


def _leads_to_neutral(kind: type[BaseModel], keys: list[str]) -> bool:
    field = kind.model_fields.get(keys[0]) if keys else None
    if field is None:
        return False
    if is_neutral(field):
        return True
    # Settings by name or in a list have that name, or their number, in between.
    below = keys[2:] if get_origin(field.annotation) is dict else keys[1:]
    if below and below[0].isdigit():
        below = below[1:]
    return any(_leads_to_neutral(inner, below) for inner in settings_classes(field.annotation))
