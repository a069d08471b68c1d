"""The completions of a run, embedded in the page as a small index and blocks of texts.

Each part is gzipped ASCII JSON in base64, so that no text can end the script element that holds it,
and lone surrogates survive. The page decodes the index after the first paint, and a block only when
one of its prompts is shown or searched.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bonbon.groups.group import Group, Prompt
from bonbon.report.data import BASE_NAME, ReportedPolicy, Run

BLOCK = 50  # prompts


@dataclass(frozen=True)
class Browser:
    """The embedded data of the page: `index` once, and a block for every BLOCK prompts."""

    models: tuple[str, ...]
    prompts: int
    index: str
    blocks: tuple[str, ...]


def embed(run: Run) -> Browser | None:
    """Return the completions of every prompt; None if the base model or all others have none.

    Prompts are sorted as they are first shown: by the first model's change of mean reward, largest
    losses first. The index has every prompt's text and each model's rewards, draw by draw; a block
    has the models' texts.
    """
    base = run.groups.get(BASE_NAME)
    models = [policy for policy in run.lineup if policy.name in run.groups]
    if not base or not models:
        return None
    groups = {policy.name: {g.prompt_id: g for g in run.groups[policy.name]} for policy in models}
    entries = [
        _entry(run, position, group, [(p, groups[p.name].get(group.prompt_id)) for p in models])
        for position, group in enumerate(base)
    ]
    first = models[0].name
    entries.sort(key=lambda entry: _regression(entry["changes"][first]))
    names = [policy.name for policy in models]
    index = {
        "models": names,
        "block": BLOCK,
        "prompts": [
            {key: value for key, value in entry.items() if key != "texts"} for entry in entries
        ],
    }
    texts = [entry["texts"] for entry in entries]
    blocks = (texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK))
    return Browser(tuple(names), len(entries), pack(index), tuple(map(pack, blocks)))


def pack(value: Any) -> str:
    """Return a value as gzipped ASCII JSON in base64."""
    data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode("ascii")


def _regression(change: float | None) -> float:
    return math.inf if change is None else change


ShownDraws = tuple[list[str], list[dict[str, float | None]]]


def _entry(
    run: Run, position: int, base: Group, models: Sequence[tuple[ReportedPolicy, Group | None]]
) -> dict[str, Any]:
    columns: dict[str, ShownDraws] = {BASE_NAME: _column(base, range(base.n)[: run.k])}
    best = _best(base, range(base.n)[run.k :][: run.n])
    if best:
        columns[f"best-of-{run.n}"] = _column(base, best)
    for policy, group in models:
        if group is not None:
            columns[policy.name] = _column(group, _draws(run, policy, group))
    return {
        "id": base.prompt_id,
        "position": position,
        "prompt": _messages(base.prompt),
        "changes": {p.name: _change(columns.get(p.name), columns[BASE_NAME]) for p, _ in models},
        "figures": {name: figures for name, (_, figures) in columns.items()},
        "texts": {name: texts for name, (texts, _) in columns.items()},
    }


def _draws(run: Run, policy: ReportedPolicy, group: Group) -> Sequence[int]:
    """Return the draws that are the policy's answers: the first k, or the best that it keeps."""
    draws = range(group.n)
    return draws[: run.k] if policy.best_of is None else _best(group, draws[: policy.best_of])


def _best(group: Group, draws: Sequence[int]) -> Sequence[int]:
    """Return a list of the best draw, of tied ones the first; empty without draws or rewards."""
    if not draws or group.rewards is None:
        return ()
    rewards = group.rewards
    return (max(draws, key=lambda draw: rewards[draw]),)


def _column(group: Group, draws: Sequence[int]) -> ShownDraws:
    """Return the texts, and the reward and further figures of each draw."""
    # Of the three estimates of a completion's KL only the default is shown.
    metrics = {name: row for name, row in group.metrics.items() if not name.startswith("kl_")}
    figures = {**metrics, "reward": group.rewards, "tokens": group.lengths()}
    figures = {"reward": group.rewards, **figures}
    return [group.completions[draw] for draw in draws], [
        {name: _short(values[draw]) for name, values in figures.items() if values is not None}
        for draw in draws
    ]


def _short(value: float) -> float | None:
    """Round to six digits; None if not finite, which JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _change(ours: ShownDraws | None, base: ShownDraws) -> float | None:
    """Return the mean reward of the model's draws minus that of the base model's."""
    means = [_mean([draw.get("reward") for draw in column[1]]) for column in (ours, base) if column]
    if len(means) < 2 or means[0] is None or means[1] is None:
        return None
    return _short(means[0] - means[1])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _messages(prompt: Prompt) -> list[list[str]]:
    """Return [[role, text], …]; a plain prompt has an empty role."""
    if isinstance(prompt, str):
        return [["", prompt]]
    return [[message["role"], message["content"]] for message in prompt]
