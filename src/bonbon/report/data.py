"""The data of a report: the figures, configuration, logs and completions in a run's folder.

Everything but `evaluation/evaluation.json` may be missing, and so may most of its keys, so that
reports of old and of partly deleted runs can be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from bonbon.evaluation.figures import Figure
from bonbon.groups.group import Group
from bonbon.groups.shards import read_groups, shard_paths
from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError

BASE_NAME = "base"


@dataclass(frozen=True)
class ReportedPolicy:
    """A policy of the evaluation; `best_of` is the number of draws it keeps the best of, if any."""

    name: str
    best_of: int | None
    values: Mapping[str, Any]

    def figure(self, *keys: str) -> Figure | None:
        """Return the figure under these keys; None if it is missing or not finite."""
        value: Any = self.values
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return as_figure(value)

    def number(self, *keys: str) -> float | None:
        """Return only the value of the figure under these keys."""
        figure = self.figure(*keys)
        return None if figure is None else figure.value

    @property
    def further(self) -> dict[str, Figure]:
        """Win rates by each reward that was not trained on."""
        names = self.values.get("win_rate_by") or {}
        figures = {name: self.figure("win_rate_by", name) for name in names}
        return {name: figure for name, figure in figures.items() if figure is not None}


def as_figure(value: Any) -> Figure | None:
    """Return {"value", "low", "high"} as a figure; None for anything else or if not finite."""
    if not isinstance(value, Mapping):
        return None
    parts = [value.get(key) for key in ("value", "low", "high")]
    if not all(isinstance(part, int | float) and math.isfinite(part) for part in parts):
        return None
    return Figure(*map(float, parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """The content of a run's folder. `groups` and `logs` are by policy name."""

    folder: Path
    evaluation: Mapping[str, Any]
    config: Mapping[str, Any]
    logs: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Sequence[Group]]

    @property
    def n(self) -> int:
        """The n of the best-of-n that policies are compared with."""
        return int(self.evaluation.get("n") or 0)

    @property
    def k(self) -> int:
        """The number of completions of each policy a prompt."""
        return int(self.evaluation.get("k") or 0)

    @cached_property
    def policies(self) -> dict[str, ReportedPolicy]:
        """All policies by name, in the evaluation's order."""
        return {
            name: ReportedPolicy(name, _best_of(name, values, self.n), values)
            for name, values in self.evaluation["models"].items()
        }

    @property
    def contenders(self) -> list[ReportedPolicy]:
        """All policies but the base model."""
        return [policy for name, policy in self.policies.items() if name != BASE_NAME]

    @property
    def trained(self) -> list[ReportedPolicy]:
        """All policies that answer with one draw, without the base model."""
        return [policy for policy in self.contenders if policy.best_of is None]

    @property
    def lineup(self) -> list[ReportedPolicy]:
        """The contenders in the order of charts: the main one, other models, best-of-k policies."""
        order = [self.main, *self.trained, *self.contenders]
        return list({policy.name: policy for policy in order if policy is not None}.values())

    @property
    def columns(self) -> list[ReportedPolicy]:
        """All policies in the order of tables: the main one first."""
        return list({p.name: p for p in (self.main, *self.policies.values()) if p}.values())

    @property
    def best_of_n(self) -> ReportedPolicy | None:
        """The measured best-of-n of the base model."""
        return self.policies.get(f"best-of-{self.n}")

    @cached_property
    def main(self) -> ReportedPolicy | None:
        """The model that the run is about; None in a comparison."""
        if "main" in self.evaluation:
            return self.policies.get(self.evaluation["main"] or "")
        # Schema version 1 does not name the main model.
        named = str((self.config.get("train") or {}).get("objective"))
        return self.policies.get(named) or (self.trained[-1] if self.trained else None)

    @property
    def further_rewards(self) -> list[str]:
        """The names of the rewards that were not trained on."""
        return list(dict.fromkeys(key for policy in self.contenders for key in policy.further))

    @property
    def best_of_k(self) -> list[Mapping[str, Any]]:
        """The best-of-k points that can be drawn, by ascending k."""
        points = self.evaluation.get("best_of_k") or []
        drawable = [p for p in points if as_figure(p.get("win_rate")) and p.get("kl") is not None]
        return sorted(drawable, key=lambda point: point["k"])


def _best_of(name: str, values: Mapping[str, Any], n: int) -> int | None:
    given = values.get("best_of")
    if given is not None:
        return int(given)
    return n if name == f"best-of-{n}" else None


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises BonbonError if it has no readable evaluation."""
    evaluation = _read_evaluation(folder)
    names = list(evaluation["models"])
    config = _read_config(folder / "config.yaml")
    groups = {
        name: read_groups(folder / "evaluation" / name)
        for name in names
        if shard_paths(folder / "evaluation" / name)
    }
    run = Run(folder, evaluation, config, {}, groups)
    main = run.main.name if run.main else None
    logs = {
        name: read_json(path)
        for name in names
        if (path := _model_folder(folder, name, main) / "training_log.json").exists()
    }
    return Run(folder, evaluation, config, logs, groups)


def _model_folder(folder: Path, name: str, main: str | None) -> Path:
    return folder / "model" if name == main else folder / "baselines" / name


def _read_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation" / "evaluation.json"
    if not path.exists():
        raise BonbonError(
            f"{folder} holds no evaluation ({path} does not exist); run `bonbon evaluate` or "
            "`bonbon run` on it first"
        )
    evaluation = read_json(path)
    models = evaluation.get("models") if isinstance(evaluation, dict) else None
    if not isinstance(models, dict) or not all(isinstance(m, dict) for m in models.values()):
        raise BonbonError(f"{path} is not an evaluation; run `bonbon evaluate` again")
    return evaluation


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BonbonError(f"cannot read {path}: {error}") from error
    return values if isinstance(values, dict) else {}
