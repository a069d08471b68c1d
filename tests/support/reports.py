"""A run's folder made up for the report, and what its page shows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bonbon.groups.group import Group
from bonbon.groups.shards import shard_path, write_shard
from bonbon.report import browser
from bonbon.report.data import read_run
from bonbon.report.page import page, summarise
from bonbon.report.theme import SvgStyles
from bonbon.report.words import headline
from support.groups import group_of

N, K = 4, 3

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>document.title='owned'</script>",
    "</textarea><img src=x onerror=\"document.title='owned'\">",
    "<!-- <script> ]]> {{7*7}} {% raw %}",
    "| pipe ` tick *star* [link](javascript:alert(1)) <b>bold</b> &amp; $x$ @you #1",
    "\u202eright to left override\u202c \u200fمرحبا\u200e \u2028 \u0000 \u001b[31m",
    "http://example.com/ is only text",
    "__strong__ _em_ snake_case_name a_ _b ~~gone~~ ![img](x) www.example.com :smile: # no title",
)


def fig(value: float, half: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def model_figures(win: float, half: float = 0.015, **changes: Any) -> dict[str, Any]:
    """A model of schema version 2 with everything measured."""
    values = {
        "best_of": None,
        "win_rate": fig(win, half),
        "win_rate_by": {"gold": fig(win - 0.003, half)},
        "win_rate_loss_by": {"gold": fig(0.003, 0.004)},
        "tie_rate": fig(0.012, 0.002),
        "length_controlled_win_rate": fig(win - 0.001, half),
        "judge": {"win_rate": fig(0.75, 0.05), "comparisons": 320, "unreadable": 3},
        "kl": fig(1.4567, 0.04),
        "kl_estimates": {
            "rao_blackwellised": fig(1.4567, 0.04),
            "plain": fig(1.4712, 0.09),
            "k3": fig(1.4411, 0.07),
        },
        "forward_kl": {"rao_blackwellised": fig(1.9, 0.1), "plain": fig(1.91), "k3": fig(1.93)},
        "recovered": fig(0.8234, 0.04),
        "kl_efficiency": fig(0.4912, 0.06),
        "length": fig(47.62, 0.4),
        "length_change": fig(0.13, 0.42),
        "tokens_per_answer": fig(47.62, 0.4),
        "metrics": {"repetition": fig(0.1234, 0.004)},
        "drift": {"repetition": fig(-0.0213, 0.003)},
        "drift_at_equal_win_rate": {"repetition": None},
        "human_text": {"perplexity": fig(9.21), "forgetting": fig(0.0213, 0.004)},
        "tasks": [
            {
                "task": "lambada",
                "metric": "acc",
                "value": 0.412,
                "standard_error": 0.01,
                "higher_is_better": True,
                "change": -0.02,
                "change_low": -0.05,
                "change_high": 0.01,
            },
            {"task": "lambada", "metric": "perplexity", "value": "nan", "standard_error": None},
        ],
    }
    return values | changes


def evaluation(**changes: Any) -> dict[str, Any]:
    """An evaluation of a base model, best-of-n, a baseline and a main model."""
    base = model_figures(0.5, 0.0, kl=fig(0.0), kl_efficiency=None, recovered=fig(0.0), judge=None)
    best = model_figures(
        0.8, 0.004, best_of=N, recovered=fig(1.0), kl=fig(0.64), kl_efficiency=fig(0.99), judge=None
    )
    values: dict[str, Any] = {
        "schema_version": 2,
        "n": N,
        "k": K,
        "prompts": 25,
        "prompts_trained_on": 0,
        "base_model": "models/story",
        "reward": {"model": "models/reward"},
        "main": "rank_regression",
        "kl_of": "sampled policy",
        "models": {
            "base": base,
            f"best-of-{N}": best,
            "sft_bon": model_figures(0.7, kl=fig(2.2, 0.1)),
            "rank_regression": model_figures(0.782),
        },
        "metrics": {"repetition": {"label": "repeated 4-grams", "unit": "share"}},
        "equal_win_rate": 0.7,
        "best_of_k": [
            {
                "k": k,
                "kl": math.log(k) - (k - 1) / k,
                "reward": fig(float(k), 0.1),
                "win_rate": fig(k / (k + 1), 0.01),
                "win_rate_by": {"gold": fig(k / (k + 1) - 0.01, 0.01)},
                "extrapolated": k > N,
            }
            for k in (1, 2, 4, 8, 16)
        ],
        "best_of_n_kl": {"bound": 0.6363, "beirami": fig(0.62, 0.01), "exact": None},
        "pairs": [
            {
                "ours": "rank_regression",
                "theirs": "sft_bon",
                "win_rate": fig(0.61, 0.02),
                "difference": fig(0.082, 0.02),
            }
        ],
        "cost": {
            "sampling": {"tokens": 1234567, "seconds": 42.0},
            "scoring": {"completions": 4000, "seconds": None},
            "training": {"rank_regression": {"seconds": 7200.0}},
            "evaluation": {"tokens": 98765, "seconds": 600.0},
        },
    }
    return values | changes


def older() -> dict[str, Any]:
    """What schema version 1 held."""
    values = evaluation()
    keys = ("n", "k", "prompts", "base_model", "reward", "kl_of")
    kept = ("win_rate", "kl", "recovered", "kl_efficiency", "length", "length_change")
    models = {
        name: {key: model[key] for key in (*kept, "tokens_per_answer", "win_rate_by")}
        for name, model in values["models"].items()
    }
    return {key: values[key] for key in keys} | {"models": models}


def draws(
    rng: np.random.Generator, prompts: Sequence[Any], n: int, shift: float, words: int = 12
) -> list[Group]:
    """Scored groups; the mean reward falls with the prompt's number where `shift` is not 0."""
    groups = []
    for number_, prompt in enumerate(prompts):
        texts = [
            f"draw {draw} of {number_}: "
            + " ".join(rng.choice(["sun", "moon", "tree", "river", "cat", "stone"], words))
            for draw in range(n)
        ]
        rewards = rng.normal(size=n) + shift * (len(prompts) / 2 - number_)
        made = group_of(f"p{number_}", prompt, texts, rewards=tuple(map(float, rewards)))
        groups.append(made.with_metric("gold", rng.normal(size=n)))
    return groups


def write_run(
    folder: Path,
    values: Mapping[str, Any] | None = None,
    prompts: int | Sequence[Any] = 25,
    words: int = 12,
    groups: Mapping[str, Sequence[Group]] | None = None,
) -> Path:
    """A run's folder as `bonbon run` leaves it, without weights."""
    values = evaluation() if values is None else values
    texts = [f"Prompt number {i}" for i in range(prompts)] if isinstance(prompts, int) else prompts
    rng = np.random.default_rng(0)
    if groups is None:
        made = {"base": draws(rng, texts, values["k"] + values["n"], 0.0, words)}
        for name, model in values["models"].items():
            if name != "base" and not name.startswith("best-of-"):
                shift = 1.0 if name == "rank_regression" else -1.0
                made[name] = draws(rng, texts, model.get("best_of") or values["k"], shift, words)
        groups = made
    for name, of in groups.items():
        write_shard(shard_path(folder / "evaluation" / name, 0), of, {})
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(values))
    config = {
        "model": {"name": values["base_model"]},
        "sampling": {"n": N, "temperature": 1.0},
        "train": {"objective": "rank_regression", "learning_rate": 5e-7, "tilt": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = [
        {"step": 10 * i, "epoch": i / 5, "loss": 3.0 / i, "accuracy": 0.5 + i / 20}
        for i in range(1, 6)
    ]
    log += [{"step": 50, "eval_loss": 0.71}, {"step": 50, "train_runtime": 3.0}]
    for place in ("model", "baselines/sft_bon"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        record = {"objective": "x", "seconds": 30.0, "log": log}
        (folder / place / "training_log.json").write_text(json.dumps(record))
    return folder


class Page(HTMLParser):
    """What a page holds: its tables, ids, tags, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where == "script":
            self.scripts[-1] += data
        elif where != "style":
            self.text += data
            if "caption" in self._open:
                self._caption += data
            elif {"td", "th"} & set(self._open):
                self._rows[-1][-1] += data

    def ids(self) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get("id"))]


def write_page(folder: Path) -> Path:
    """The page without charts, which take most of the time."""
    run = read_run(folder)
    path = folder / "report.html"
    path.write_text(page(summarise(run), {}, browser.embed(run), SvgStyles()), encoding="utf-8")
    return path


def sentences(tmp_path: Path, values: Mapping[str, Any]) -> list[str]:
    (tmp_path / "evaluation").mkdir(exist_ok=True)
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(values))
    return headline(read_run(tmp_path))


MAIN_TABLE = {
    "win rate": ("win_rate", 100, 1, "%"),
    "win rate by gold": ("win_rate_by.gold", 100, 1, "%"),
    "win rate at equal length": ("length_controlled_win_rate", 100, 1, "%"),
    "win rate by a judge": ("judge.win_rate", 100, 1, "%"),
    "KL from the base (nats)": ("kl", 1, 2, ""),
    "recovered": ("recovered", 100, 1, "%"),
    "KL efficiency": ("kl_efficiency", 1, 2, ""),
    "length (tokens)": ("length", 1, 1, ""),
    "length change (tokens)": ("length_change", 1, 1, ""),
    "tokens drawn for an answer": ("tokens_per_answer", 1, 1, ""),
}


def check_main_table(html: str, models: Mapping[str, Any]) -> list[str]:
    """Every cell of the table of all models holds the evaluation's figure; the rows' names."""
    rows = Page(html).tables["All models against the base model, with 95% intervals"]
    names = rows[0][1:]
    assert sorted(names) == sorted(models)
    for row in rows[1:]:
        key, factor, digits, suffix = MAIN_TABLE[row[0]]
        for name, cell in zip(names, row[1:], strict=True):
            found: Any = models[name]
            for part in key.split("."):
                found = found and found[part]
            assert numbers_in(cell) == expected(found, factor, digits), (row[0], name)
            assert suffix in cell or not found
    return [row[0] for row in rows[1:]]


def numbers_in(text: str) -> list[float]:
    text = text.replace("−", "-").replace("95% interval", "")
    return [float(found.replace(",", "")) for found in re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", text)]


def expected(found: Mapping[str, float] | None, factor: float, digits: int) -> list[float]:
    if not found:
        return []
    keys = ("value", "low", "high") if found["low"] < found["high"] else ("value",)
    return [round(factor * found[key], digits) + 0.0 for key in keys]
