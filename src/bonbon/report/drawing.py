"""What the charts have in common: their look, and how they become files and parts of a page."""

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

_WIDTH = 5.6  # inches; narrow, so that letters stay readable when a phone scales it down
INK, MUTED = PAPER["ink"], PAPER["muted"]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bonbon",  # or ids would differ from one writing to the next
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
    """A chart as part of the page (`svg`), what it says in words, and its data."""

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
    """Save the figure as PNG and SVG, and make it part of the page."""
    _save(figure, plots / f"{name}.png", format="png", dpi=200)
    figure.set_layout_engine("none")  # the layout holds, and takes half of the time
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
        # A script that no font here has becomes boxes in the PNG; the SVG keeps the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, **options)


def new_axes(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of that height in inches, and its axes, shape (rows, columns)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained", facecolor=PAPER["paper"])
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def add_legend(canvas: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the axes, where it hides no data."""
    # Labels that begin with "_" would be left out of a legend.
    # The axes keep their height, however many rows the legend has.
    columns = 1 if any(len(label) > 24 for label in labels) else 2
    rows = -(-len(labels) // columns)
    width, height = canvas.get_size_inches()
    canvas.set_size_inches(width, height + max(0, rows - 5) * 0.2)
    canvas.legend(
        handles,
        [f" {plain(label)}" for label in labels],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        borderaxespad=0,
    )


def plain(text: str) -> str:
    """A name without what an XML file cannot hold, and not longer than a legend can be."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 40 else text[:39] + "…"


def looks(run: Run) -> dict[str, tuple[str, str]]:
    """Colour and marker of every model that answers with one draw, the same in all charts."""
    models = [policy for policy in run.lineup if policy.best_of is None]
    return {policy.name: mark(index) for index, policy in enumerate(models)}


def colour_of(run: Run, name: str) -> str:
    """The model's colour in all charts."""
    return looks(run).get(name, (INK, ""))[0]
