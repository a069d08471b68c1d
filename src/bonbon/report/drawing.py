"""Parts that the charts share: their style, and saving them as files and parts of the page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonbon.report.data import Run
from bonbon.report.tables import Table
from bonbon.report.theme import PAPER, SvgStyles, mark
from bonbon.system.atomic_files import atomic_path, write_text

_WIDTH = 5.6  # inches; narrow, so that text stays readable on a phone
INK, MUTED = PAPER["ink"], PAPER["muted"]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bonbon",  # makes ids reproducible
    "text.usetex": False,
    "text.parse_math": False,  # a name may hold a $
    "font.family": "sans-serif",
    "font.size": 9.5,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": PAPER["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Chart:
    """A chart as part of the page (`svg`), with its title in words and its data."""

    name: str
    title: str
    svg: str
    tables: tuple[Table, ...]


def finish(
    name: str,
    title: str,
    figure: Any,
    tables: Sequence[Table | None],
    styles: SvgStyles,
    plots: Path,
) -> Chart:
    """Save the figure as PNG and SVG, and return it as a part of the page."""
    _save(figure, plots / f"{name}.png", format="png", dpi=200)
    figure.set_layout_engine("none")  # the layout is done; repeating it takes half of the time
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    write_text(plots / f"{name}.svg", svg)
    drawn_tables = tuple(table for table in tables if table is not None)
    return Chart(name, title, styles.inline(svg, name.replace("_", "-"), title), drawn_tables)


def _save(figure: Any, path: Path, **options: Any) -> None:
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Characters that no installed font has become boxes in the PNG; the SVG keeps the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, **options)


def new_axes(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure of a height in inches, and its axes, shape (rows, columns)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained", facecolor=PAPER["paper"])
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def add_legend(canvas: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend below the axes, where it hides no data."""
    # The figure grows with the legend, so that the axes keep their height.
    columns = 1 if any(len(label) > 24 for label in labels) else 2
    rows = -(-len(labels) // columns)
    width, height = canvas.get_size_inches()
    canvas.set_size_inches(width, height + max(0, rows - 5) * 0.2)
    canvas.legend(
        handles,
        [f" {plain(label)}" for label in labels],  # a legend leaves out labels that start with "_"
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        borderaxespad=0,
    )


def plain(text: str) -> str:
    """Return a name of at most 40 characters, with "\ufffd" for those that XML cannot hold."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 40 else text[:39] + "…"


def looks(run: Run) -> dict[str, tuple[str, str]]:
    """Return the colour and marker of every model that answers with one draw."""
    models = [policy for policy in run.lineup if policy.best_of is None]
    return {policy.name: mark(index) for index, policy in enumerate(models)}


def colour_of(run: Run, name: str) -> str:
    """Return a model's colour, the same in all charts."""
    return looks(run).get(name, (INK, ""))[0]
