"""Charts of the win rate against KL, and against length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bonbon.evaluation.figures import Figure
from bonbon.report.data import ReportedPolicy, Run, as_figure
from bonbon.report.drawing import INK, MUTED, Chart, finish, looks, new_axes
from bonbon.report.numbers import number, shown
from bonbon.report.point_labels import PointLabel, label_points
from bonbon.report.tables import Table, best_of_k_table, table
from bonbon.report.theme import PAPER, SvgStyles
from bonbon.tilt.exponential import optimal_win_rate


def win_rate_kl(run: Run, styles: SvgStyles, plots: Path) -> Iterator[Chart]:
    points = _points(run, "kl")
    if not points:
        return
    canvas, grid = new_axes(4.6)
    axes, limit = grid[0][0], _largest_kl(run, points)
    labels = [*_crosses(axes, run, points), *_frontier(axes, limit), *_best_of_k(axes, run)]
    axes.set_xlim(-0.03 * limit, limit)
    axes.set_xlabel("KL from the base model (nats)")
    _win_rate_axis(axes)
    label_points(axes, labels)
    summary = "; ".join(f"{p.name} {w.value:.0%} at {x.value:.2f} nats" for p, x, w in points)
    title = f"Win rate against KL, below the frontier that no rank-based policy passes: {summary}."
    tables = (_points_table("Win rate against KL", points), best_of_k_table(run))
    yield finish("win_rate_kl", title, canvas, tables, styles, plots)


Point = tuple[ReportedPolicy, Figure, Figure]


def _points(run: Run, key: str) -> list[Point]:
    """Return (policy, figure, win rate) of every policy that has both, the main one first."""
    pairs = [(policy, policy.figure(key), policy.figure("win_rate")) for policy in run.lineup]
    return [(policy, x, win) for policy, x, win in pairs if x is not None and win is not None]


def _largest_kl(run: Run, points: Sequence[Point]) -> float:
    measured = [float(p["kl"]) for p in run.best_of_k if not p.get("extrapolated")]
    return 1.15 * max([x.high for _, x, _ in points] + measured + [0.1])


def _frontier(axes: Any, limit: float) -> Iterator[PointLabel]:
    kls = limit * np.linspace(0, 1, 100) ** 2  # the frontier rises as √KL
    most = optimal_win_rate(kls)
    axes.plot(kls, most, color=INK, linewidth=1.1)
    axes.fill_between(kls, most, 1.0, color=INK, alpha=0.07, linewidth=0)
    yield _base(axes)
    at = 0.45 * limit
    yield PointLabel(at, float(optimal_win_rate(at)), "the most at any KL", INK)


def _base(axes: Any) -> PointLabel:
    axes.plot([0], [0.5], "*", color=INK, markersize=9, clip_on=False, linestyle="none")
    return PointLabel(0, 0.5, "base model", INK)


def _best_of_k(axes: Any, run: Run) -> Iterator[PointLabel]:
    """Draw best-of-k by the reward trained on and by the first further one, a line each."""
    if not run.best_of_k:
        return
    yield from _best_of_k_line(axes, run, None, "best-of-k")
    names = list(dict.fromkeys(n for p in run.best_of_k for n in p.get("win_rate_by") or {}))
    for name in names[:1]:
        yield from _best_of_k_line(axes, run, name, f"best-of-k by {name}")


def _best_of_k_line(axes: Any, run: Run, reward: str | None, label: str) -> Iterator[PointLabel]:
    def win(point: Any) -> Figure | None:
        return as_figure(
            point["win_rate"] if reward is None else (point.get("win_rate_by") or {}).get(reward)
        )

    drawn = [(p["kl"], win(p), p["k"], bool(p.get("extrapolated"))) for p in run.best_of_k]
    known = [(kl, w, k) for kl, w, k, beyond in drawn if w is not None and not beyond]
    beyond = known[-1:] + [(kl, w, k) for kl, w, k, beyond in drawn if w is not None and beyond]
    shape, dashes = ("o", "solid") if reward is None else ("s", (0, (1.5, 1.5)))
    look = {"marker": shape, "markersize": 3.5, "color": MUTED, "linewidth": 1}
    if known:
        kls, wins = [kl for kl, _, _ in known], [w for _, w, _ in known]
        axes.fill_between(
            kls,
            [w.low for w in wins],
            [w.high for w in wins],
            color=MUTED,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(kls, [w.value for w in wins], linestyle=dashes, **look)
        at = len(kls) // 2
        side: Literal["above", "below"] = "above" if reward is None else "below"
        yield PointLabel(kls[at], wins[at].value, label, MUTED, side)
        if reward is None:
            _number_points(axes, known)
    if len(beyond) > len(known[-1:]):
        hollow = {**look, "markerfacecolor": PAPER["paper"], "linestyle": (0, (4, 3))}
        axes.plot([kl for kl, _, _ in beyond], [w.value for _, w, _ in beyond], **hollow)
        if reward is None:
            kl, win_rate, _ = beyond[len(beyond) // 2]
            yield PointLabel(kl, win_rate.value, f"{label}, extrapolated", MUTED)


def _number_points(axes: Any, known: Sequence[tuple[float, Figure, int]]) -> None:
    for kl, win, k in known:
        if k & (k - 1) == 0 and k > 1:
            axes.annotate(
                f"{k}", (kl, win.value), (4, -11), textcoords="offset points", fontsize=8,
                color=MUTED,
            )  # fmt: skip


def _crosses(axes: Any, run: Run, points: Sequence[Point]) -> Iterator[PointLabel]:
    """Draw each policy as a cross of its intervals; policies of several draws are hollow."""
    by_name = looks(run)
    for policy, x, win in points:
        look: dict[str, Any] = {"color": INK, "fmt": "h", "markerfacecolor": PAPER["paper"]}
        if policy.best_of is None:
            colour, marker = by_name[policy.name]
            look = {"color": colour, "fmt": marker}
        bars = {"xerr": _spread(x), "yerr": _spread(win), "linewidth": 1.3, "capsize": 2.5}
        axes.errorbar([x.value], [win.value], markersize=6, **look, **bars)
        yield PointLabel(x.value, win.value, policy.name, look["color"])


def _spread(figure: Figure) -> list[list[float]]:
    return [[max(0, figure.value - figure.low)], [max(0, figure.high - figure.value)]]


def _win_rate_axis(axes: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylabel("win rate against the base model")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.1 else 1))
    axes.set_ylim(max(0.0, low), min(1.0, high))


def _points_table(caption: str, points: Sequence[Point], unit: str = "nats") -> Table | None:
    signed = unit == "tokens"
    rows = [(p.name, shown(x, unit, signed), shown(win, "share")) for p, x, win in points]
    if signed:
        return table(caption, ("model", "length change (tokens)", "win rate"), rows)
    most = [number(100 * float(optimal_win_rate(max(0.0, x.value))), 1) + "%" for _, x, _ in points]
    rows_with_most = [(*row, limit) for row, limit in zip(rows, most, strict=True)]
    return table(caption, ("model", "KL (nats)", "win rate", "the most at that KL"), rows_with_most)


def win_rate_length(run: Run, styles: SvgStyles, plots: Path) -> Iterator[Chart]:
    points = _points(run, "length_change")
    if not points:
        return
    canvas, grid = new_axes(3.8)
    axes = grid[0][0]
    axes.axvline(0, color=MUTED, linewidth=0.8)
    labels = [*_crosses(axes, run, points), _base(axes)]
    axes.set_xlabel("length change against the base model (tokens)")
    _win_rate_axis(axes)
    label_points(axes, labels)
    summary = "; ".join(f"{p.name} {number(x.value, 1, True)} tokens" for p, x, _ in points)
    caption = "Win rate against length change"
    tables = (_points_table(caption, points, "tokens"),)
    yield finish("win_rate_length", f"{caption}: {summary}.", canvas, tables, styles, plots)
