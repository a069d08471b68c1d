"""A plan for a cluster in words and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bonbon.planning.cluster.splits import ClusterPlan, Estimate, Split, plan_from_files

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 11


def show(
    cluster: Path,
    groups: Path | None,
    win_rate: float | None,
    by: str | None,
    max_n: int,
    as_json: bool,
) -> None:
    """Plan a cluster and print the plan, as `bonbon plan --cluster`; see `plan_from_files`."""
    planned = plan_from_files(cluster, groups, win_rate, by, max_n)
    if as_json:
        print(json.dumps(asdict(planned), indent=2))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(estimates_table(planned))
    console.print(splits_table(planned))
    print("\n".join(plan_sentences(planned)))


def plan_sentences(planned: ClusterPlan) -> list[str]:
    """Describe the plan in sentences; the first two hold the settings to use."""
    best, other = planned.best, planned.one_after_other
    sentences = [
        f"Both stages at a time: engine.samplers.max: {best.samplers}, engine.scorers.max: "
        f"{best.scorers}: {best.hours:.2f} hours by the simulation ({best.closed_form_hours:.2f} "
        f"by the slower stage alone){_cost_phrase(best.cost)}; the {best.bottleneck} are the "
        "bottleneck.",
        f"One after the other, each on all GPUs: engine.samplers.max: {other.samplers}, "
        f"engine.scorers.max: {other.scorers}: {other.hours:.2f} hours{_cost_phrase(other.cost)}.",
    ]
    if best.failures:
        sentences.append(
            f"It includes {best.failures} node failures, which redo {best.redone} shards."
        )
    if planned.from_pilot is not None:
        row = planned.from_pilot.by_estimate
        assert row is not None
        sentences.append(
            f"n = {row.n:,} is the pilot's for a win rate of {planned.from_pilot.wanted:g} "
            f"({row.win_rate.value:.3f}, 95% interval {row.win_rate.low:.3f} to "
            f"{row.win_rate.high:.3f}); lengths are the pilot's too."
        )
    return sentences


def _cost_phrase(cost: float) -> str:
    return f" for {cost:,.0f}" if cost else ""


def estimates_table(planned: ClusterPlan) -> Table:
    """Tabulate the estimates."""
    from rich.table import Table

    table = Table(title="On paper")
    table.add_column("")
    table.add_column("estimate", justify="right")
    for estimate in planned.estimates:
        table.add_row(estimate.name, shown_value(estimate))
    return table


def shown_value(estimate: Estimate) -> str:
    """Format an estimate with its unit: three digits, or a whole number."""
    value = estimate.value
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {estimate.unit}".rstrip()


def splits_table(planned: ClusterPlan) -> Table:
    """Tabulate the splits around the best one, which is marked with `*`."""
    from rich.table import Table

    table = Table(
        title=f"{planned.prompts:,} prompts × {planned.n} completions in {planned.shards:,} shards "
        f"on {planned.gpus} GPUs",
        caption="* the fastest; idle and blocked are fractions of the stage's time",
    )
    priced = any(split.cost for split in planned.splits)
    for name in (
        *("samplers", "scorers", "hours", "slower stage", "samplers idle", "blocked"),
        *("scorers idle", "bottleneck", *["cost"] * priced),
    ):
        table.add_column(name, justify="right")
    for split in _around_best(planned):
        table.add_row(
            f"{'*' if split == planned.best else ''}{split.samplers}",
            f"{split.scorers}",
            f"{split.hours:.2f}",
            f"{split.closed_form_hours:.2f}",
            f"{split.sampler_idle:.2f}",
            f"{split.sampler_blocked:.2f}",
            f"{split.scorer_idle:.2f}",
            split.bottleneck,
            *([f"{split.cost:,.0f}"] if priced else []),
        )
    return table


def _around_best(planned: ClusterPlan) -> Sequence[Split]:
    last = max(0, len(planned.splits) - MOST_ROWS)
    start = min(max(0, planned.splits.index(planned.best) - MOST_ROWS // 2), last)
    return planned.splits[start : start + MOST_ROWS]
