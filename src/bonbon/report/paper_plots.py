"""Plots for papers and the command line, in the report's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bonbon.report.theme import DATA_COLOURS, mark
from bonbon.system.atomic_files import atomic_path
from bonbon.system.errors import BonbonError
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.exponential import optimal_win_rate

if TYPE_CHECKING:
    from bonbon.planning.which_n import Plan

FORMATS = ("png", "svg", "pdf")


def _frontier_axes(max_kl: float, ns: Sequence[float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    kls = np.linspace(0, max_kl, 400)
    frontier = optimal_win_rate(kls)
    axes.plot(kls, frontier, color="black", linewidth=1.2, label="no rank-based policy does better")
    axes.fill_between(kls, frontier, 1.0, color="black", alpha=0.06, linewidth=0)
    points = [BestOfN(n) for n in ns if BestOfN(n).kl() <= max_kl]
    axes.plot(
        [tilt.kl() for tilt in points],
        [tilt.win_rate() for tilt in points],
        "x",
        color="#555555",
        label="best-of-n",
    )
    for tilt in points:
        axes.annotate(
            f"{tilt.n:g}", (tilt.kl(), tilt.win_rate()), (3, -10), textcoords="offset points",
            fontsize=8, color="#555555",
        )  # fmt: skip
    axes.set_xlabel("KL from the base model (nats)")
    axes.set_ylabel("win rate against the base model")
    axes.set_ylim(None, 1.005)
    axes.grid(alpha=0.25)
    return figure, axes


def check_plot_path(path: Path) -> str:
    """Return the format of a plot by the file's suffix. Raises BonbonError if it is unknown."""
    suffix = path.suffix.lstrip(".").lower() or "png"
    if suffix not in FORMATS:
        raise BonbonError(f"{path}: a plot's file must end in one of {', '.join(FORMATS)}")
    return suffix


def _save(figure: Any, path: Path) -> None:
    suffix = check_plot_path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=160)


def plot_frontier(ns: Sequence[float], path: Path) -> None:
    """Plot win rate against KL: the optimal frontier and best-of-n for the given n."""
    figure, axes = _frontier_axes(1.15 * max(BestOfN(max(ns)).kl(), 0.5), ns)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], n: int, path: Path, max_kl: float = 6.0
) -> None:
    """Plot methods as curves of (KL in nats, win rate), the frontier and best-of-n."""
    figure, axes = _frontier_axes(max_kl, sorted({2, 4, 8, 16, 32, 64, n}))
    for index, (name, points) in enumerate(curves.items()):
        colour, marker = mark(index)
        axes.plot(
            [kl for kl, _ in points],
            [win for _, win in points],
            marker=marker,
            color=colour,
            linestyle=("-", "--", ":")[index // len(DATA_COLOURS) % 3],
            linewidth=1.2,
            markersize=4,
            label=name,
        )
    axes.set_xlim(-0.1, max_kl)
    axes.set_ylim(0.5, 1.005)
    axes.legend(loc="lower right", fontsize=7)
    _save(figure, path)


def plot_plan(planned: Plan, path: Path) -> None:
    """Plot the win rate of best-of-n against its cost in tokens, and the wanted win rate.

    Intervals are a band; after the last measured n the curve is dashed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    colour, _ = mark(0)
    tokens = [row.tokens for row in planned.rows]
    rates = [row.win_rate for row in planned.rows]
    measured = sum(not row.extrapolated for row in planned.rows)
    for part, style, label in (
        (slice(measured), "o-", "measured"),
        (slice(measured - 1, None), "--", "extrapolated"),
    ):
        if len(tokens[part]) > 1 or label == "measured":
            values = [rate.value for rate in rates[part]]
            axes.plot(tokens[part], values, style, color=colour, markersize=4, label=label)
    axes.fill_between(
        tokens, [r.low for r in rates], [r.high for r in rates],
        color=colour, alpha=0.15, linewidth=0, label="95% interval",
    )  # fmt: skip
    axes.axhline(planned.wanted, color="black", linewidth=0.8, label="wanted")
    for row in planned.rows:
        axes.annotate(
            f"{row.n}", (row.tokens, row.win_rate.value), (0, -11), textcoords="offset points",
            fontsize=7, color="#555555", ha="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("tokens generated a prompt (points: n)")
    by = "" if planned.by is None else f" by {planned.by}"
    axes.set_ylabel(f"win rate of best-of-n{by}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, path)
