"""Labels at the points of a chart cover neither each other nor what is drawn."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bonbon.report.drawing import new_axes
from bonbon.report.point_labels import PointLabel, label_points


def labelled(points: list[tuple[float, float]]) -> tuple[Figure, list[Bbox]]:
    """A chart with a marker and a label at each point, and where the labels are, in pixels."""
    canvas, grid = new_axes(4.6)
    axes = grid[0][0]
    axes.set_xlim(0, 3)
    axes.set_ylim(0.5, 1)
    for x, y in points:
        axes.errorbar([x], [y], xerr=[[0.05], [0.05]], yerr=[[0.02], [0.02]], fmt="o")
    labels = [PointLabel(x, y, f"a policy {i}", "#000000") for i, (x, y) in enumerate(points)]
    label_points(axes, labels)
    canvas.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
    return canvas, [text.get_window_extent() for text in axes.texts]


@pytest.mark.slow
def test_labels_of_close_points_do_not_overlap() -> None:
    close = [(1.0 + 0.06 * i, 0.8 + 0.01 * (i % 2)) for i in range(5)]
    _, boxes = labelled(close)
    assert len(boxes) == 5
    for one, other in itertools.combinations(boxes, 2):
        assert Bbox.intersection(one, other) is None


@pytest.mark.slow
def test_labels_cover_no_marker_and_stay_inside() -> None:
    points = [(0.02, 0.52), (2.98, 0.99), (1.5, 0.75), (2.9, 0.55)]
    canvas, boxes = labelled(points)
    axes = canvas.axes[0]
    frame = axes.get_window_extent()
    assert len(boxes) == 4
    for box in boxes:
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
        for point in points:
            assert not box.contains(*axes.transData.transform(point))


def test_labels_of_two_close_lines_stay_on_their_sides() -> None:
    canvas, grid = new_axes(4.6)
    axes = grid[0][0]
    axes.plot([0, 3], [0.6, 0.95])
    axes.plot([0, 3], [0.59, 0.94])
    upper = PointLabel(1.5, 0.775, "best-of-k", "#000000", "above")
    lower = PointLabel(1.5, 0.765, "best-of-k by gold", "#000000", "below")
    label_points(axes, [upper, lower])
    canvas.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert boxes["best-of-k"].y0 > axes.transData.transform((1.5, 0.775))[1]
    assert boxes["best-of-k by gold"].y1 < axes.transData.transform((1.5, 0.765))[1]
