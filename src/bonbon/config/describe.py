"""Describe every setting of a run: its type, default, range and explanation.

`bonbon config` prints them, and docs/configuration.md is written from them. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bonbon.config.fields import settings_classes
from bonbon.config.run import RunConfig
from bonbon.system.errors import BonbonError

REQUIRED = "required"


@dataclass(frozen=True)
class Described:
    """A setting: its dotted key, what it may be, and the settings below it.

    `default` is JSON, or `required`. `choices` are names that it must be one of. `like` is the key
    of settings of the same class that were described before; then there is nothing in `below`.
    With `by_name` those settings stand below names that the user gives.
    """

    key: str
    type: str
    default: str
    range: str
    explanation: str
    choices: tuple[str, ...] = ()
    below: tuple[Described, ...] = ()
    like: str | None = None
    by_name: bool = False
    is_optional: bool = False


def describe(names: Mapping[str, tuple[str, ...]]) -> tuple[Described, ...]:
    """Every setting of a run. `names` are the choices of keys that the configuration lacks."""
    return tuple(_settings(RunConfig, "", names, {}))


def leaves(settings: tuple[Described, ...]) -> Iterator[Described]:
    """Every described setting, those below it after it."""
    for setting in settings:
        yield setting
        yield from leaves(setting.below)


def find(key: str, settings: tuple[Described, ...]) -> Described:
    """Return the setting of a dotted key. BonbonError with close matches where there is none."""
    known = {setting.key: setting for setting in leaves(settings)}
    wanted = _generic(key, known)
    if wanted in known:
        return known[wanted]
    last = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(key, known, n=3) or [
        last[name] for name in get_close_matches(key.rpartition(".")[2], last, n=3)
    ]
    hint = f"did you mean {' or '.join(close)}?" if close else "`bonbon config` prints all keys"
    raise BonbonError(f"unknown key {key}; {hint}")


def _generic(key: str, known: Mapping[str, Described]) -> str:
    """A key as it is described: `baselines.dpo.n` is `train.n`, which baselines are like."""
    done, is_name = "", False
    for part in key.split("."):
        at = known.get(done)
        if not is_name and at is not None and (at.by_name or part.isdigit()):
            is_name = True  # or a number in a list: no key
            continue
        is_name = False
        section = at.like if at is not None and at.like else done
        done = f"{section}.{part}" if section else part
    return done


def _settings(
    kind: type[BaseModel],
    prefix: str,
    names: Mapping[str, tuple[str, ...]],
    seen: dict[type[BaseModel], str],
) -> Iterator[Described]:
    for name, info in kind.model_fields.items():
        yield _described(f"{prefix}{name}", info, names, seen)


def _described(
    key: str,
    info: FieldInfo,
    names: Mapping[str, tuple[str, ...]],
    seen: dict[type[BaseModel], str],
) -> Described:
    kinds = list(dict.fromkeys(settings_classes(info.annotation)))
    by_name = get_origin(_without_none(info.annotation)) is dict
    below: list[Described] = []
    like = None
    if kinds and kinds[0] in seen:
        like = seen[kinds[0]]
    elif kinds:
        below = _of_kinds(kinds, key, names, seen)
    choices = names.get(key) or _choices(info.annotation)
    return Described(
        key=key,
        type=type_name(info.annotation),
        default=_default(info),
        range=_range(info),
        explanation=(info.description or "").replace("None:", "null:"),
        choices=choices,
        below=tuple(below),
        like=like,
        by_name=by_name,
        is_optional=NoneType in get_args(info.annotation),
    )


def _of_kinds(
    kinds: list[type[BaseModel]],
    key: str,
    names: Mapping[str, tuple[str, ...]],
    seen: dict[type[BaseModel], str],
) -> list[Described]:
    """The settings below a key: of its class, or of each of several kinds that `name` selects."""
    merged: dict[str, Described] = {}
    for kind in kinds:
        seen.setdefault(kind, key)
        own = {setting.key: setting for setting in _settings(kind, f"{key}.", names, seen)}
        title = own.get(f"{key}.name") if len(kinds) > 1 else None
        for setting in own.values():
            if title is not None and setting is not title:
                note = f"With {title.choices[0]}: {setting.explanation}"
                setting = replace(setting, explanation=note)
            first = merged.setdefault(setting.key, setting)
            if title is not None and setting is title and first is not setting:
                words = f"{first.explanation} {setting.choices[0]}: {setting.explanation}"
                both = (*first.choices, *setting.choices)
                merged[setting.key] = replace(first, choices=both, explanation=words)
    return list(merged.values())


def type_name(annotation: Any) -> str:
    """The words for a type: `number`, `list of text`, `mapping`."""
    plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    inner = _without_none(annotation)
    if inner in plain:
        return plain[inner]
    origin = get_origin(inner)
    if origin is Literal:
        return "name"
    if origin in (list, tuple):
        return f"list of {type_name(get_args(inner)[0])}s".replace("mappings", "settings")
    if origin is dict or list(settings_classes(inner)):
        return "settings"
    if origin in (Union, UnionType):
        return " or ".join(type_name(arg) for arg in get_args(inner))
    return "path" if getattr(inner, "__name__", "") == "Path" else "any value"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    others = [arg for arg in get_args(annotation) if arg is not NoneType]
    return others[0] if len(others) == 1 else annotation


def _choices(annotation: Any) -> tuple[str, ...]:
    inner = _without_none(annotation)
    return get_args(inner) if get_origin(inner) is Literal else ()


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return REQUIRED
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = {"name": value.name} if "name" in type(value).model_fields else {}  # type: ignore[attr-defined]
    return json.dumps(value)


def _range(info: FieldInfo) -> str:
    words = {Gt: "above {}", Ge: "at least {}", Lt: "below {}", Le: "at most {}"}
    limits = []
    for mark in info.metadata:
        for kind, word in words.items():
            if isinstance(mark, kind):
                limit = getattr(mark, kind.__name__.lower())  # Gt(gt=0)
                limits.append(word.format(f"{limit:,}"))
        if isinstance(mark, MinLen):
            limits.append("not empty")
    return " and ".join(limits)
