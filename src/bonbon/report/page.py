"""Fills the templates of the page and of its Markdown version."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bonbon.config.settings import flatten
from bonbon.report import tables, words
from bonbon.report.browser import Browser
from bonbon.report.data import Run
from bonbon.report.drawing import Chart
from bonbon.report.glossary import glossary
from bonbon.report.numbers import number, shown
from bonbon.report.ranking import ranked
from bonbon.report.tables import Table, table
from bonbon.report.theme import SvgStyles, variables
from bonbon.system.version import installed_version

_HERE = Path(__file__).parent
# Characters with a meaning inside a line of GitHub's Markdown; others stay readable.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&#@$]|(?<![^\W_])_|_(?![^\W_])|:(?=\w|//)|(?<=www)\.")


@dataclass(frozen=True)
class Summary:
    """The texts and tables of a report; all but its charts and completions."""

    title: str
    subtitle: str
    n: int
    headline: list[str]
    tiles: list[words.Tile]
    ranking: Table | None
    main_tables: list[Table]
    drift_tables: list[Table]
    honesty_tables: list[Table]
    run_tables: list[Table]
    settings: Table | None
    command: str
    glossary: Mapping[str, str]
    version: str = field(default_factory=installed_version)


def summarise(run: Run) -> Summary:
    """Return the texts and tables of the page."""
    return Summary(
        title=_title(run),
        subtitle=_subtitle(run),
        n=run.n,
        headline=words.headline(run),
        tiles=words.tiles(run),
        ranking=_ranking(run),
        main_tables=_present(
            tables.main_table(run),
            tables.kl_table(run),
            tables.best_of_n_kl_table(run),
            tables.pairs_table(run),
        ),
        drift_tables=_present(*tables.drift_tables(run), tables.forgetting_table(run)),
        honesty_tables=_present(tables.honesty_table(run), tables.tasks_table(run)),
        run_tables=_present(_run_table(run), tables.cost_table(run)),
        settings=table("All settings", ("setting", "value"), list(_settings(run).items())),
        command=_command(run),
        glossary=glossary(run),
    )


def _present(*candidates: Table | None) -> list[Table]:
    return [candidate for candidate in candidates if candidate is not None]


def _title(run: Run) -> str:
    base = Path(str(run.evaluation.get("base_model", "base model"))).name
    if run.main is None:
        return f"{len(run.contenders)} policies against {base}"
    return f"{base} aligned by {run.main.name}"


def _subtitle(run: Run) -> str:
    return (
        f"Measured on {number(run.evaluation.get('prompts'))} prompts, {run.k} completions of each "
        f"model a prompt, beside best-of-{run.n}. All intervals are 95% intervals."
    )


def _ranking(run: Run) -> Table | None:
    if run.main is not None:
        return None
    rows = [
        (
            policy.name,
            shown(policy.figure("win_rate"), "share"),
            shown(policy.figure("kl"), "nats"),
            shown(policy.figure("length_change"), "tokens", signed=True),
            shown(policy.figure("tokens_per_answer"), "tokens"),
        )
        for policy in ranked(run)
    ]
    header = ("policy", "win rate", "KL (nats)", "length change (tokens)", "tokens an answer")
    return table("The policies by win rate", header, rows)


def _settings(run: Run) -> dict[str, str]:
    return {key: _plain(value) for key, value in flatten(run.config).items()}


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


_MAIN_SETTINGS = {
    "prompts.path": "prompts",
    "evaluation.prompts.path": "prompts of the evaluation",
    "sampling.n": "draws a prompt",
    "sampling.temperature": "temperature",
    "sampling.max_new_tokens": "longest completion (tokens)",
    "rounds": "rounds",
    "train.objective": "objective",
    "train.tilt": "tilt",
    "train.n": "n aimed at",
    "train.learning_rate": "learning rate",
    "train.epochs": "epochs",
    "train.batch_size": "groups a batch",
    "train.kl_budget": "KL budget (nats)",
}


def _run_table(run: Run) -> Table | None:
    """Return a table of the models, the data and the main settings."""
    settings = _settings(run)
    described = run.evaluation.get("reward") or {}
    reward = flatten(described if isinstance(described, Mapping) else {"model": str(described)})
    rows = [
        ("base model", str(run.evaluation.get("base_model", "–"))),
        ("reward trained on", _reward(reward)),
        ("further rewards", ", ".join(run.further_rewards) or "none"),
        ("models", ", ".join(policy.name for policy in run.contenders)),
        *(
            (label, settings[key])
            for key, label in _MAIN_SETTINGS.items()
            if settings.get(key, "–") != "–"
        ),
    ]
    return table("Models, data and main settings", ("what", "value"), rows)


def _reward(flat: Mapping[str, Any]) -> str:
    named = [str(v) for key, v in flat.items() if key.rsplit(".", 1)[-1] in ("model", "function")]
    return " + ".join(name for name in named if name != "None") or "–"


def _command(run: Run) -> str:
    config = shlex.quote(str(run.folder / "config.yaml"))
    policies = run.evaluation.get("policies")
    if policies is None:
        return f"bonbon run {config} --out NEW_FOLDER"
    return f"bonbon compare {shlex.join(policies)} --config {config} --out NEW_FOLDER"


# --- templates ------------------------------------------------------------------------------------


def page(
    summary: Summary, charts: Mapping[str, Chart], browser: Browser | None, styles: SvgStyles
) -> str:
    """Return the page as HTML."""
    style = variables() + _read("page.css") + styles.css()
    script = _read("page.js")
    drawn = {name: {**vars(chart), "svg": Markup(chart.svg)} for name, chart in charts.items()}
    text = _template("page.html.jinja").render(
        report=summary,
        charts=_Charts(drawn),
        browser=browser,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return _storable(text)


def markdown_text(summary: Summary, charts: Mapping[str, Chart]) -> str:
    """Return the report without completions in GitHub's Markdown."""
    text = _template("report.md.jinja").render(report=summary, charts=_Charts(charts))
    return _storable(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _storable(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Charts(dict[str, Any]):
    """Charts by name; one that was not drawn is None."""

    def __missing__(self, name: str) -> None:
        return None


def escape_markdown(text: str) -> str:
    """Escape a text for a line or a table cell of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(text).split()))


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=lambda template: template is None or template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template(name)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
