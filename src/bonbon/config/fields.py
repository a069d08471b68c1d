"""Marks on the fields of settings, and the settings that a field holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass(frozen=True)
class NeutralMark:
    """Marks a setting that cannot change a result, such as a batch size in tokens or a device."""


Neutral = Annotated[T, NeutralMark()]


def is_neutral(field: FieldInfo) -> bool:
    """Return whether a setting is marked `Neutral`: it cannot change a result."""
    return any(isinstance(mark, NeutralMark) for mark in field.metadata)


def settings_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes inside an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from settings_classes(inner)
