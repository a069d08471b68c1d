"""The report's tables: figures in rows, policies in columns, all cells formatted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bonbon.evaluation.figures import Figure
from bonbon.report.data import ReportedPolicy, Run, as_figure
from bonbon.report.numbers import MISSING, Shown, duration, number, shown


@dataclass(frozen=True)
class Table:
    """A table with a caption, a header and rows; a row's first cell is its heading."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]


Row = tuple[str, Callable[[ReportedPolicy], Figure | None], str, bool]


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table | None:
    """Return a table of cells that are `Shown` or texts; None without rows."""
    if not rows:
        return None
    cells = tuple(
        tuple(cell if isinstance(cell, Shown) else Shown(str(cell)) for cell in row) for row in rows
    )
    return Table(caption, tuple(header), cells)


def _by_policy(caption: str, run: Run, rows: Sequence[Row]) -> Table | None:
    """Return a table of figures by policy, without empty rows and columns."""
    policies = [policy for policy in run.columns if any(of(policy) for _, of, _, _ in rows)]
    measured = [
        [label, *(shown(figure, unit, signed) for figure in figures)]
        for label, of, unit, signed in rows
        if any(figures := [of(policy) for policy in policies])
    ]
    return table(caption, ["figure", *(policy.name for policy in policies)], measured)


def _figure(*keys: str) -> Callable[[ReportedPolicy], Figure | None]:
    return lambda policy: policy.figure(*keys)


def main_table(run: Run) -> Table | None:
    """Return the main figures of every policy."""
    further: list[Row] = [
        (f"win rate by {name}", _figure("win_rate_by", name), "share", False)
        for name in run.further_rewards
    ]
    rows: list[Row] = [
        ("win rate", _figure("win_rate"), "share", False),
        *further,
        ("win rate at equal length", _figure("length_controlled_win_rate"), "share", False),
        ("win rate by a judge", _figure("judge", "win_rate"), "share", False),
        ("KL from the base (nats)", _figure("kl"), "nats", False),
        ("recovered", _figure("recovered"), "share", False),
        ("KL efficiency", _figure("kl_efficiency"), "ratio", False),
        ("length (tokens)", _figure("length"), "tokens", False),
        ("length change (tokens)", _figure("length_change"), "tokens", True),
        ("tokens drawn for an answer", _figure("tokens_per_answer"), "tokens", False),
    ]
    return _by_policy("All models against the base model, with 95% intervals", run, rows)


_ESTIMATES = {
    "rao_blackwellised": "Rao-Blackwellised",
    "plain": "log-ratios",
    "k3": "k3",
    "closed_form": "closed form",
}


def kl_table(run: Run) -> Table | None:
    """Return the KL by each estimator, in both directions."""
    rows: list[Row] = [
        (f"{direction}, {title}", _figure(key, estimate), "nats", False)
        for key, direction in (
            ("kl_estimates", "KL(model ‖ base)"),
            ("forward_kl", "KL(base ‖ model)"),
        )
        for estimate, title in _ESTIMATES.items()
    ]
    return _by_policy("KL in nats by three estimators, which should agree", run, rows)


def best_of_n_kl_table(run: Run) -> Table | None:
    """Return best-of-n's KL: the bound for any reward, and the value given its ties."""
    values = run.evaluation.get("best_of_n_kl") or {}
    rows = [
        (label, shown(figure, "nats"))
        for label, figure in (
            ("bound for any reward", _exact(values.get("bound"))),
            ("estimate of Beirami et al.", as_figure(values.get("beirami"))),
            ("exact", _exact(values.get("exact"))),
        )
        if figure
    ]
    return table(f"KL of best-of-{run.n} (nats)", ("KL", "nats"), rows)


def _exact(value: Any) -> Figure | None:
    return as_figure({"value": value, "low": value, "high": value})


def pairs_table(run: Run) -> Table | None:
    """Return the win rate of each pair of models."""
    rows = [
        (
            f"{pair.get('ours')} against {pair.get('theirs')}",
            shown(as_figure(pair.get("win_rate")), "share"),
            shown(as_figure(pair.get("difference")), "points", signed=True),
        )
        for pair in run.evaluation.get("pairs") or []
    ]
    header = ("pair", "win rate of the first", "difference against the base (of 100)")
    return table("Model against model", header, rows)


def drift_tables(run: Run) -> list[Table]:
    """Return the off-target metrics, their drift, and the drift at an equal win rate."""
    metrics = _metrics(run)
    at = run.evaluation.get("equal_win_rate")
    at_equal = f"Drift at an equal win rate of {number(100 * at, 1)}%" if at is not None else ""
    kinds = [
        ("Drift: change against the base model", "drift", True),
        (at_equal or "Drift at an equal win rate", "drift_at_equal_win_rate", True),
        ("Off-target metrics", "metrics", False),
    ]
    tables = []
    for caption, key, signed in kinds:
        rows: list[Row] = []
        for name, label, unit in metrics:
            # A share changes by percentage points, not by per cent.
            is_points = signed and unit == "share"
            shown_as = label.replace("(share)", "(points)") if is_points else label
            rows.append((shown_as, _figure(key, name), "points" if is_points else unit, signed))
        tables.append(_by_policy(caption, run, rows))
    return [item for item in tables if item is not None]


def _metrics(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, label with unit, unit) of every off-target metric of any policy."""
    known: Mapping[str, Any] = run.evaluation.get("metrics") or {}
    measured = (policy.values.get("drift") or {} for policy in run.contenders)
    names = dict.fromkeys([*known, *(name for metrics in measured for name in metrics)])
    labelled = []
    for name in names:
        described = known.get(name) or {}
        label, unit = described.get("label") or name, described.get("unit") or ""
        labelled.append((name, f"{label} ({unit})" if unit else label, unit))
    return labelled


def honesty_table(run: Run) -> Table | None:
    """Return win rates by the reward trained on, by further rewards, and by the judge."""
    rows: list[Row] = [("by the reward trained on", _figure("win_rate"), "share", False)]
    rows += [
        (f"by {name}, never trained on", _figure("win_rate_by", name), "share", False)
        for name in run.further_rewards
    ]
    rows.append(("by a judge model", _figure("judge", "win_rate"), "share", False))
    win_rates = _by_policy("Win rate against the base model, by each reward and judge", run, rows)
    counts = tuple(
        _judge_counts([run.policies[name] for name in win_rates.header[1:]] if win_rates else [])
    )
    return win_rates and Table(win_rates.caption, win_rates.header, win_rates.rows + counts)


def _judge_counts(policies: Sequence[ReportedPolicy]) -> Iterator[tuple[Shown, ...]]:
    judges = [policy.values.get("judge") or {} for policy in policies]
    for key, label in (
        ("comparisons", "judge’s comparisons"),
        ("unreadable", "of them unreadable"),
    ):
        if any(judge.get(key) is not None for judge in judges):
            yield (Shown(label), *(Shown(number(judge.get(key))) for judge in judges))


def forgetting_table(run: Run) -> Table | None:
    """Return the models' figures on human text."""
    rows: list[Row] = [
        ("perplexity on human text", _figure("human_text", "perplexity"), "", False),
        ("bits a byte of human text", _figure("human_text", "bits_per_byte"), "", False),
        ("forgetting (nats a token)", _figure("human_text", "forgetting"), "", True),
    ]
    return _by_policy("Human text", run, rows)


def tasks_table(run: Run) -> Table | None:
    """Return the results of lm-evaluation-harness tasks, and their change."""
    values = {
        (task.get("task"), task.get("metric"), policy.name): task
        for policy in run.columns
        for task in policy.values.get("tasks") or []
    }
    names = [policy.name for policy in run.columns]
    rows = [
        (_task_label(task, metric, values), *(_task(values.get((task, metric, n))) for n in names))
        for task, metric in dict.fromkeys((task, metric) for task, metric, _ in values)
    ]
    return table(
        "Tasks: ± one standard error, and the change over the base model with its 95% interval",
        ["task", *names],
        rows,
    )


def _task_label(task: str, metric: str, values: Mapping[Any, Mapping[str, Any]]) -> str:
    better = next(v.get("higher_is_better") for k, v in values.items() if k[:2] == (task, metric))
    return f"{task}, {metric}" + (" (lower is better)" if better is False else "")


def _task(value: Mapping[str, Any] | None) -> Shown:
    if not value or value.get("value") is None:
        return Shown(MISSING)
    if isinstance(value["value"], str):  # "nan" and the like, from the harness
        return Shown(value["value"])
    error, change = value.get("standard_error"), value.get("change")
    parts = [f"± {number(error, 3)}"] if error is not None else []
    if change is not None and value.get("change_low") != value.get("change_high"):
        parts.append(f"{number(change, 3, signed=True)}{_change_interval(value)}")
    return Shown(number(value["value"], 3), ", ".join(parts))


def _change_interval(value: Mapping[str, Any]) -> str:
    low, high = value.get("change_low"), value.get("change_high")
    if low is None or high is None:
        return ""
    return f" ({number(low, 3, signed=True)} to {number(high, 3, signed=True)})"


def best_of_k_table(run: Run) -> Table | None:
    """Return best-of-k of the base model for each k."""
    names = list(dict.fromkeys(n for p in run.best_of_k for n in p.get("win_rate_by") or {}))
    rows = [
        (
            f"best-of-{point['k']}" + (" (extrapolated)" if point.get("extrapolated") else ""),
            number(point["kl"], 2),
            shown(as_figure(point["win_rate"]), "share"),
            *(shown(as_figure((point.get("win_rate_by") or {}).get(n)), "share") for n in names),
            shown(as_figure(point.get("reward")), ""),
        )
        for point in run.best_of_k
    ]
    header = ["draws", "KL (nats)", "win rate", *(f"by {name}" for name in names), "mean reward"]
    return table("Best-of-k of the base model", header, rows)


def cost_table(run: Run) -> Table | None:
    """Return the cost of each stage."""
    cost = run.evaluation.get("cost") or {}
    trainings = cost.get("training") or run.logs
    stages = [
        (stage, cost[stage]) for stage in ("sampling", "scoring", "evaluation") if cost.get(stage)
    ]
    stages += [(f"training {name}", part) for name, part in trainings.items()]
    rows = [(stage, _amount(part), duration(part.get("seconds"))) for stage, part in stages]
    return table("Cost", ("stage", "amount", "time"), rows)


def _amount(part: Mapping[str, Any]) -> str:
    for unit in ("tokens", "completions"):
        if part.get(unit) is not None:
            return f"{number(part[unit])} {unit}"
    return MISSING
