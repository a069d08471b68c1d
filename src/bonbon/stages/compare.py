"""Comparison of any number of policies: models, adapters, and decoding settings.

A policy is written `[NAME=]MODEL[@DECODING]`. MODEL is a model or adapter folder, a hub id, the
folder of a run (its trained model), or `base`. DECODING is a comma-separated list of `best-of-N`,
`temperature=T`, `top_p=P` and `top_k=K`; the other settings are the configuration's `sampling`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.config.evaluation import is_policy_name
from bonbon.config.run import RunConfig, load_config
from bonbon.config.sampling import ModelConfig
from bonbon.evaluation.results import Evaluation
from bonbon.groups.prompts import PromptRow
from bonbon.groups.shards import shard_paths
from bonbon.runs.fingerprints import sampler_settings
from bonbon.runs.prompts import RunPrompts
from bonbon.runs.run_folder import RunFolder
from bonbon.stages.checks import check_config
from bonbon.stages.evaluate import evaluation_of, write_evaluation
from bonbon.stages.measure import BASE, Policy, drawn_folder, measure_policies
from bonbon.system.digests import weights_digest
from bonbon.system.errors import BonbonError

_DECODINGS = "best-of-N, temperature=T, top_p=P, top_k=K"
_NUMBERS = {"temperature": float, "top_p": float, "top_k": int}


@dataclass(frozen=True)
class PolicySpec:
    """A policy as the user wrote it; `decoding` holds changes to the sampling settings."""

    name: str
    model: str
    best_of: int = 1
    decoding: dict[str, float] = field(default_factory=dict)
    text: str = field(default="", compare=False)


def parse_policy(text: str) -> PolicySpec:
    """Parse `[NAME=]MODEL[@DECODING]`. Raises BonbonError for anything else."""
    head, at, tail = text.rpartition("@")
    written, decoding = (head, tail) if at and _is_decoding(tail) else (text, "")
    name, equals, model = written.partition("=")
    if not equals or not is_policy_name(name):
        name, model = "", written
    if not model:
        raise BonbonError(f"policy {text!r}: write it as [NAME=]MODEL[@DECODING]")
    best_of, changes = _parse_decoding(decoding, text)
    return PolicySpec(name or _default_name(model, decoding), model, best_of, changes, text)


def _is_decoding(text: str) -> bool:
    return bool(re.match(r"best-of-|temperature=|top_p=|top_k=", text))


def _parse_decoding(text: str, policy: str) -> tuple[int, dict[str, float]]:
    best_of, changes = 1, {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            if part.startswith("best-of-"):
                best_of = int(part.removeprefix("best-of-"))
            else:
                changes[key.strip()] = _NUMBERS[key.strip()](value)
        except (KeyError, ValueError):
            raise BonbonError(
                f"policy {policy!r}: {part!r} is not a decoding setting (known: {_DECODINGS})"
            ) from None
    if best_of < 1:
        raise BonbonError(f"policy {policy!r}: best-of-N needs N >= 1")
    return best_of, changes


def _default_name(model: str, decoding: str) -> str:
    """Return the default name of a model: its folder's, or its run's."""
    path = Path(model)
    last = path.parent.name if path.name == "model" else path.name
    words = [last or model, *decoding.split(",")]
    return "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", word).strip("-") for word in words if word)


def comparison_config(
    specs: Sequence[PolicySpec], config: Path | None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Load the configuration of prompts, reward, base model and sampling.

    Without `config` it is that of the first run folder among the policies. Raises BonbonError when
    there is none.
    """
    runs = [run / "config.yaml" for spec in specs if (run := _run_of(spec)) is not None]
    path = config or next(iter(runs), None)
    if path is None:
        raise BonbonError(
            "no policy is a run's folder, so the prompts and the reward are unknown; give --config "
            "run.yaml"
        )
    return load_config(path, overrides).model_copy(
        update={"storage": None}
    )  # only for a run's shards


def compare(folder: RunFolder, specs: Sequence[PolicySpec]) -> Evaluation:
    """Compare policies with the configuration's base model and with each other.

    Policies can be added to a comparison later; the others' draws are kept.
    """
    config = folder.config
    check_config(config)
    policies = [Policy(BASE, config.model, config.sampling)]
    for spec in specs:
        policy = _policy(spec, config)
        if policy.name in {BASE, f"best-of-{config.target_n}", *(it.name for it in policies)}:
            raise BonbonError(
                f"two policies are called {policy.name!r}; name one of them: NAME={spec.model}"
            )
        policies.append(policy)
    rows = folder.rows.evaluation()
    folder.notes.refuse("sample", "rounds", "evaluate", what="a run")
    folder.notes.refuse("generate", what="answers of `bonbon generate`")
    folder.notes.begin("compare", _settings(config, folder.rows))
    for policy in policies:
        if not shard_paths(drawn_folder(folder, policy.name)):
            folder.notes.forget(f"compare-{policy.name}")
        folder.notes.begin(f"compare-{policy.name}", _policy_settings(policy))
    evaluation = evaluation_of(folder, measure_policies(folder, policies, rows))
    about = {
        "main": None,
        "prompts_trained_on": _trained_on(specs, rows),
        "prompts_left_out": len(rows) - evaluation.prompts,
        "policies": [spec.text for spec in specs],
    }
    write_evaluation(folder, evaluation, about)
    return evaluation


def _run_of(spec: PolicySpec) -> Path | None:
    """Return the run's folder that a policy names; None if it names none."""
    folder = Path(spec.model).expanduser()
    return folder if spec.model != BASE and (folder / "config.yaml").is_file() else None


def _trained_on(specs: Sequence[PolicySpec], rows: Sequence[PromptRow]) -> int | None:
    """Count the prompts that any of the runs was trained on; None where this is unknown."""
    seen = np.zeros(len(rows), bool)
    for spec in specs:
        if (run := _run_of(spec)) is not None:
            try:
                prompts = RunPrompts(load_config(run / "config.yaml"))
                seen |= prompts.trained_on(row.prompt for row in rows)
            except BonbonError:  # its prompts have been moved
                return None
    return int(seen.sum())


def _policy(spec: PolicySpec, config: RunConfig) -> Policy:
    if not is_policy_name(spec.name):
        raise BonbonError(f"policy {spec.name!r}: give it a name of letters, digits, '-' and '_'")
    return Policy(spec.name, _model(spec, config), _checked(config, spec), spec.best_of)


def _model(spec: PolicySpec, config: RunConfig) -> ModelConfig:
    if spec.model == BASE:
        return config.model
    run = _run_of(spec)
    if run is not None and not (run / "model").is_dir():
        raise BonbonError(f"{run} has no trained model yet; run `bonbon train` first")
    folder = Path(spec.model).expanduser() if run is None else run / "model"
    if not folder.is_dir():  # a hub id: the base's revision does not apply
        return config.model.model_copy(update={"name": spec.model, "revision": None})
    return config.model.model_copy(update={"name": str(folder)})


def _checked(config: RunConfig, spec: PolicySpec) -> Any:
    values = config.sampling.model_dump() | spec.decoding
    try:
        return type(config.sampling).model_validate(values)
    except ValueError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in getattr(error, "errors", list)())
        raise BonbonError(f"policy {spec.name!r}: {problems}") from error


def _settings(config: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    values = config.model_dump(mode="json", include={"model", "sampling"})
    drawing = {"prompts", "holdout", "k", "seed"}
    values["evaluation"] = config.evaluation.model_dump(mode="json", include=drawing)
    if config.evaluation.prompts is not None:
        values["evaluation"]["prompts"]["content"] = prompts.digest(config.evaluation.prompts.path)
    else:
        values["prompts"] = config.prompts.model_dump(mode="json")
        values["prompts"]["content"] = prompts.digest(config.prompts.path)
    return values | {"n": config.target_n} | sampler_settings(config)


def _policy_settings(policy: Policy) -> dict[str, Any]:
    return {
        "model": policy.model.model_dump(mode="json"),
        "weights": weights_digest(Path(policy.model.name).expanduser()),
        "sampling": policy.sampling.model_dump(mode="json"),
        "best_of": policy.best_of,
    }
