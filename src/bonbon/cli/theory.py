"""Commands that compute and show: plan, frontier, report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bonbon.cli.options import AsJson, PlotPath, reported_errors
from bonbon.system.errors import BonbonError


def plan(
    groups: Annotated[
        str | None, typer.Argument(metavar="GROUPS", help="A pilot: a folder of scored groups.")
    ] = None,
    win_rate: Annotated[
        float | None, typer.Option("--win-rate", help="The one that is wanted.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="A metric that decides a win in the reward's place.")
    ] = None,
    max_n: Annotated[int, typer.Option("--max-n", help="The largest n to consider.")] = 1024,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="How fast completions are drawn; else as the pilot's were.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Simulate this cluster: hours, idle GPUs and cost."),
    ] = None,
    plot: PlotPath = None,
    as_json: AsJson = False,
) -> None:
    """Which n reaches a wanted win rate, at what KL and cost; and how to share a cluster's GPUs."""
    with reported_errors():
        from bonbon.system.storage import storage_path

        pilot = None if groups is None else storage_path(groups)
        if cluster is not None:
            if plot is not None or tokens_per_second is not None:
                raise BonbonError("--plot and --tokens-per-second do not go with --cluster")
            from bonbon.planning.cluster.tables import show

            show(cluster, pilot, win_rate, by, max_n, as_json)
            return
        if pilot is None or win_rate is None:
            raise BonbonError("plan needs GROUPS, a pilot's folder, and --win-rate; or --cluster")
        from bonbon.groups.shards import read_groups
        from bonbon.planning.which_n import plan as make_plan
        from bonbon.planning.which_n import plan_sentences, plan_table, sampling_speed_beside
        from bonbon.report.paper_plots import check_plot_path

        if plot is not None:
            check_plot_path(plot)
        speed = tokens_per_second
        if speed is None:
            speed = sampling_speed_beside(pilot)
        planned = make_plan(read_groups(pilot), win_rate, by, max_n, speed)
        if as_json:
            print(json.dumps(asdict(planned), indent=2))
        else:
            from rich.console import Console

            Console(width=None if sys.stdout.isatty() else 100).print(plan_table(planned))
            print("\n".join(plan_sentences(planned)))
        if plot is not None:
            from bonbon.report.paper_plots import plot_plan

            plot_plan(planned, plot)
            print(f"plot: {plot}", file=sys.stderr)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a run or a comparison.")
    ],
) -> None:
    """Write DIR/report.html (one file, to look at and to share), report.md and plots."""
    with reported_errors():
        from bonbon.report import write_report

        print(write_report(folder))


def frontier(
    n: Annotated[str, typer.Option("--n", help="Comma-separated, each a real >= 1.")] = "2,4,8",
    plot: PlotPath = None,
    as_json: AsJson = False,
) -> None:
    """Return what theory allows: best-of-n's win rate and KL, and the optimum beside them."""
    with reported_errors():
        from bonbon.tilt.frontier import frontier_rows, parse_ns

        ns = parse_ns(n)
        rows = frontier_rows(ns)
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            _print_rows(rows)
        if plot is not None:
            from bonbon.report.paper_plots import plot_frontier

            plot_frontier(ns, plot)
            print(f"plot: {plot}", file=sys.stderr)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if name == "n" else f"{value:.4f}"


def _print_rows(rows: list[dict[str, float | None]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Best-of-n and the optimal tilt (KL in nats)")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    Console().print(table)
