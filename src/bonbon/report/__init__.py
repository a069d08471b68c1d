"""The report of a run: a self-contained web page, the same in Markdown, and the plots.

`report.html` needs no network: it holds its style and script, and its content security policy
allows nothing else. All figures come from `evaluation/evaluation.json`, the completions from the
groups beside it.
"""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path) -> Path:
    """Write `report.html`, `report.md` and `plots/` into a run's folder; return the page's path.

    Raises BonbonError when the folder has no readable evaluation, or cannot be written.
    """
    # Imported here, since they take a second to load.
    from bonbon.report.browser import embed
    from bonbon.report.charts import draw_charts
    from bonbon.report.data import read_run
    from bonbon.report.page import markdown_text, page, summarise
    from bonbon.report.theme import SvgStyles
    from bonbon.system.atomic_files import write_text

    run = read_run(folder)
    styles = SvgStyles()
    charts = draw_charts(run, styles, folder / "plots")
    summary = summarise(run)
    write_text(folder / "report.md", markdown_text(summary, charts))
    path = folder / "report.html"
    write_text(path, page(summary, charts, embed(run), styles))
    return path
