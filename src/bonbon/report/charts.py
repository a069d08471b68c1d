"""All charts of a report."""

from __future__ import annotations

from pathlib import Path

from bonbon.report.data import Run
from bonbon.report.drawing import STYLE, Chart
from bonbon.report.reward_charts import reward_histogram, training
from bonbon.report.theme import SvgStyles
from bonbon.report.win_rate_charts import win_rate_kl, win_rate_length


def draw_charts(run: Run, styles: SvgStyles, plots: Path) -> dict[str, Chart]:
    """Draw every chart that there is data for, and save each as PNG and SVG in `plots`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return {
            chart.name: chart
            for draw in (win_rate_kl, win_rate_length, reward_histogram, training)
            for chart in draw(run, styles, plots)
        }
