"""The command `config`: every setting of a run, with its default and its explanation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bonbon.cli.options import reported_errors

if TYPE_CHECKING:
    from bonbon.config.describe import Described


def config(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Explain this key, e.g. train.kl_budget.")
    ] = None,
) -> None:
    """Print all settings with their defaults, as YAML with comments; or explain one of them."""
    with reported_errors():
        from bonbon.config.describe import find

        settings = all_settings()
        print(explanation_of(find(key, settings)) if key else as_yaml(settings))


def all_settings() -> tuple[Described, ...]:
    """Every setting of a run, with the names of objectives and tilts."""
    from bonbon.config.describe import describe
    from bonbon.objectives.catalogue import OBJECTIVES
    from bonbon.tilt.catalogue import TILTS

    return describe({"train.objective": tuple(OBJECTIVES), "train.tilt": tuple(TILTS)})


def explanation_of(setting: Described) -> str:
    """Return what there is to know about one setting, a fact a line."""
    facts = [
        f"{setting.key}: {setting.explanation}",
        f"  type: {setting.type}{', or null' if setting.is_optional else ''}",
        f"  default: {setting.default}",
    ]
    if setting.range:
        facts.append(f"  range: {setting.range}")
    if setting.choices:
        facts.append(f"  one of: {', '.join(setting.choices)}")
    if setting.like:
        facts.append(f"  keys: those of {setting.like}")
    if setting.below:
        facts.append(f"  keys: {', '.join(it.key.rpartition('.')[2] for it in setting.below)}")
    if setting.key == "train.arguments":
        facts.append("  and any field of transformers.TrainingArguments that the run does not set")
    return "\n".join(facts)


def as_yaml(settings: tuple[Described, ...]) -> str:
    """Return YAML with comments that holds every setting at its default.

    What may be left out altogether, such as a judge, stands there commented out. Required values
    are empty.
    """
    lines = [
        "# Every setting of a run, at its default. `bonbon config KEY` explains one.",
        *(line for setting in settings for line in _lines(setting, "", commented=False)),
    ]
    return "\n".join(lines)


def _lines(setting: Described, indent: str, *, commented: bool) -> list[str]:
    name = setting.key.rpartition(".")[2]
    start = "# " if commented else ""
    note = note_of(setting)
    is_open = bool(setting.below) and not setting.is_optional and not setting.by_name
    # The settings of one of several kinds begin with the default's name.
    value = "" if is_open or setting.default == "required" else f" {setting.default}"
    lines = [f"{start}{indent}{name}:{value}  # {note}"]
    chosen = _chosen(setting)
    for inner in setting.below:
        own = commented or not is_open or (bool(chosen) and not inner.key.endswith(".name"))
        lines += _lines(inner, f"{indent}  ", commented=own)
    return lines


def _chosen(setting: Described) -> str:
    """The name of the kind that is the default, of settings that come in several kinds."""
    import json

    default = json.loads(setting.default) if setting.default != "required" else None
    return str(default["name"]) if isinstance(default, dict) and "name" in default else ""


def note_of(setting: Described) -> str:
    """Return a setting's explanation, its choices and its range, in one line."""
    parts = [setting.explanation]
    if setting.default == "required":
        parts.append("Required.")
    if setting.choices:
        parts.append(f"One of {', '.join(setting.choices)}.")
    if setting.range:
        parts.append(f"{setting.range[0].upper()}{setting.range[1:]}.")
    if setting.like:
        parts.append(f"Keys as in {setting.like}.")
    return " ".join(parts)
