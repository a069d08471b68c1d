"""The console table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from bonbon.evaluation.figures import Figure
    from bonbon.evaluation.results import ModelEvaluation


def results_table(results: Mapping[str, ModelEvaluation]) -> Table:
    """Return a table with one row a model; ± is half the width of the 95% interval."""
    further = list(next(iter(results.values())).win_rate_by)
    table = Table(
        title="Against the base model, on held-out prompts",
        caption="KL in nats, lengths in tokens; ± is half the width of the 95% interval",
    )
    names = [
        "model",
        "win rate",
        *(f"win rate by {name}" for name in further),
        "KL",
        "recovered",
        "KL efficiency",
        "length",
        "change",
        "tokens an answer",
    ]
    for name in names:
        is_name = name == "model"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for name, result in results.items():
        table.add_row(
            name,
            _shown(result.win_rate, 3),
            *(_shown(result.win_rate_by[key], 3) for key in further),
            _shown(result.kl, 2),
            _shown(result.recovered, 2),
            _shown(result.kl_efficiency, 2),
            _shown(result.length, 1),
            _shown(result.length_change, 1),
            _shown(result.tokens_per_answer, 0),
        )
    return table


def _shown(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return "–"
    half = (figure.high - figure.low) / 2
    return f"{figure.value:.{digits}f}" + (f" ±{half:.{digits}f}" if half > 0 else "")
