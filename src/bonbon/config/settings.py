"""Checked settings: pydantic models, read from YAML, changed with `--set key=value`.

Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bonbon.config.fields import is_neutral, settings_classes
from bonbon.config.renamed import what_became_of
from bonbon.system.errors import BonbonError

Kind = TypeVar("Kind", bound="Settings")


class Settings(BaseModel):
    """Checked, immutable settings; unknown keys, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises BonbonError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BonbonError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BonbonError(f"the configuration {path} is not UTF-8") from error
    return _yaml(text, str(path))


def parse_settings(
    kind: type[Kind], values: Any, overrides: Sequence[str] = (), source: str = "the configuration"
) -> Kind:
    """Checked settings of any kind from plain values, `key=value` overrides applied.

    Raises BonbonError naming the wrong key or value and what was expected.
    """
    if not isinstance(values, dict):
        given = "it is empty" if values is None else "it has none"
        raise BonbonError(f"{source}: expected keys such as model, prompts, reward; {given}")
    values = parse_overrides(overrides, values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise BonbonError(f"{source}: {'; '.join(_explain(kind, error))}") from error


# Not by OmegaConf: it drops the name of a bare `engine: ray` when engine.workers is set, takes a
# key without "=" for null, and reads ${...} as a reference. pydantic-settings reads JSON, not YAML.
def parse_overrides(
    overrides: Sequence[str], values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Plain values with `key=value` overrides set in them; BonbonError for any other form."""
    changed = dict(values or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise BonbonError(f"--set {override!r}: write it as key=value, e.g. sampling.n=4")
        _set(changed, key.split("."), _yaml(value, f"--set {override}"), override)
    return changed


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a text; here it is a number, as everyone means it. "1e-4" is not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BonbonError(f"{source} is not YAML: {error}") from error


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        # A bare `engine: ray` has settings too.
        inner = values.get(key) if depth else named(values.get(key))
        if inner is not None and not isinstance(inner, dict):
            raise BonbonError(f"--set {override!r}: {key} has no keys of its own")
        values[key] = dict(inner or {})
        values = values[key]
    values[keys[-1]] = value


def named(value: Any) -> Any:
    """A bare name as `{name: NAME}`, the form in which its settings can stand beside it."""
    return {"name": value} if isinstance(value, str) else value


def _explain(root: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        keys, kind = _place(root, problem["loc"])
        where = ".".join(keys)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = f"unknown key {where} (known here: {', '.join(kind.model_fields)})"
            yield what_became_of(kind, where) or known
        elif problem["type"] == "missing":
            yield f"the key {where} is missing"
        elif problem["type"] == "union_tag_invalid":
            yield f"{where}.name is one of {problem['ctx']['expected_tags']}"
        elif problem["type"] == "union_tag_not_found":
            yield f"the key {where}.name is missing"
        elif where:
            yield f"{where} = {problem['input']!r:.60}: {message}"
        else:
            yield message


def _place(
    root: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to a problem, and the settings that its last key belongs to."""
    keys: list[str] = []
    kind, kinds = root, [root]
    for part in location:
        if part not in kind.model_fields and len(kinds) > 1:  # the tag of one of several kinds
            kind = next(k for k in kinds if part in get_args(k.model_fields["name"].annotation))
            kinds = [kind]
            continue
        keys.append(str(part))
        field = kind.model_fields.get(str(part))
        if field is not None and len(keys) < len(location):
            kinds = list(settings_classes(field.annotation)) or kinds
            kind = kinds[0] if part != location[-1] else kind
    return keys, kind


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, for naming what differs between two configurations.

    The mappings of a list are numbered: {"a": [{"b": 1}]} is {"a.0.b": 1}.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without_neutral(values: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Return plain values of settings of this class without those that are marked `Neutral`."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        field = kind.model_fields.get(key)
        if field is not None and is_neutral(field):
            continue
        inner = [] if field is None else list(settings_classes(field.annotation))
        if isinstance(value, Mapping) and len(inner) == 1:
            value = without_neutral(value, inner[0])
        kept[key] = value
    return kept
