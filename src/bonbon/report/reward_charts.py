"""Charts of the rewards before and after training, and of the training itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bonbon.report.data import BASE_NAME, Run
from bonbon.report.drawing import INK, MUTED, Chart, add_legend, colour_of, finish, new_axes, plain
from bonbon.report.histograms import Histograms, histograms
from bonbon.report.numbers import number
from bonbon.report.tables import Table, table
from bonbon.report.theme import SvgStyles


def reward_histogram(run: Run, styles: SvgStyles, plots: Path) -> Iterator[Chart]:
    from matplotlib.ticker import PercentFormatter

    binned = histograms(run)
    if binned is None:
        return
    panels = [name for name in binned.shares if name not in binned.reference] or [BASE_NAME]
    canvas, grid = new_axes(0.9 + 1.5 * len(panels), rows=len(panels), sharex=True, sharey=True)
    for axes, name in zip(grid[:, 0], panels, strict=True):
        handles = _histogram_panel(axes, binned, name, colour_of(run, name))
    grid[-1, 0].set_xlabel("reward")
    grid[-1, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    canvas.supylabel("share of completions", fontsize=9.5)
    add_legend(canvas, *zip(*handles, strict=True))
    title = f"Distribution of rewards of {', '.join(binned.shares)}."
    rows = [
        (f"{low:.3g} to {high:.3g}", *(f"{100 * s[i]:.1f}%" for s in binned.shares.values()))
        for i, (low, high) in enumerate(zip(binned.edges[:-1], binned.edges[1:], strict=True))
    ]
    data = table("Share of completions by reward", ("reward", *binned.shares), rows)
    yield finish("reward_histogram", title, canvas, (data,), styles, plots)


def _histogram_panel(
    axes: Any, binned: Histograms, name: str, colour: str
) -> list[tuple[Any, str]]:
    handles = []
    for reference, shares in binned.shares.items():
        if reference == BASE_NAME:
            drawn = axes.stairs(shares, binned.edges, fill=True, color=MUTED, alpha=0.3)
        elif reference in binned.reference:
            drawn = axes.stairs(
                shares, binned.edges, color=INK, linewidth=1.1, linestyle=(0, (3, 2))
            )
        else:
            continue
        handles.append((drawn, reference))
    if name not in binned.reference:
        drawn = axes.stairs(binned.shares[name], binned.edges, color=colour, linewidth=1.7)
        axes.set_title(plain(name), loc="left", color=colour)
    return handles


def training(run: Run, styles: SvgStyles, plots: Path) -> Iterator[Chart]:
    logs = {
        policy.name: entries
        for policy in run.lineup
        if (entries := _by_step(run.logs.get(policy.name, {}).get("log") or []))
    }
    if not logs:
        return
    canvas, grid = new_axes(0.5 + 1.7 * len(logs), rows=len(logs), columns=2)
    for row, (name, entries) in zip(grid, logs.items(), strict=True):
        _training_panels(row, name, entries, colour_of(run, name))
    for axes in grid[-1]:
        axes.set_xlabel("step")
    tables = [_training_table(name, entries) for name, entries in logs.items()]
    title = f"Training loss and accuracy by step of {', '.join(logs)}."
    yield finish("training", title, canvas, tables, styles, plots)


def _training_panels(row: Any, name: str, entries: Sequence[dict[str, Any]], colour: str) -> None:
    row[0].set_title(f"{plain(name)}: loss", loc="left", color=colour)
    row[1].set_title("accuracy", loc="left", color=colour)
    for axes, key, label, dashes in (
        (row[0], "loss", "training", "solid"),
        (row[0], "eval_loss", "held out", (0, (4, 2))),
        (row[1], "accuracy", "training", "solid"),
    ):
        series = [(e["step"], e[key]) for e in entries if e.get(key) is not None and "step" in e]
        if series:
            look = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 2.5}
            axes.plot(*zip(*series, strict=True), linewidth=1.3, label=label, **look)
    if len(row[0].lines) > 1:
        row[0].legend(frameon=False)
    for axes in row:
        axes.set_visible(bool(axes.lines))  # objectives of the best alone have no accuracy
        axes.xaxis.get_major_locator().set_params(integer=True)


def _by_step(log: Sequence[dict[str, Any]], most: int = 200) -> list[dict[str, Any]]:
    """Return the log's entries, merged by step and thinned evenly to about `most`."""
    merged: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            merged.setdefault(entry.get("step", 0), {}).update(entry)
    entries = list(merged.values())
    stride = max(1, len(entries) // most)
    return [e for i, e in enumerate(entries) if i % stride == 0 or "eval_loss" in e]


def _training_table(name: str, entries: Sequence[dict[str, Any]]) -> Table | None:
    keys = [key for key in ("loss", "eval_loss", "accuracy") if any(key in e for e in entries)]
    rows = [(e["step"], *(number(e.get(key), 3) for key in keys)) for e in entries]
    return table(f"Training of {name}", ("step", *(key.replace("_", " ") for key in keys)), rows)
