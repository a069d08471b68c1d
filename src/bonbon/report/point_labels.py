"""Labels at the points of a chart, placed where they cover least. A long legend is hard to read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from bonbon.report.drawing import plain

# From the point, in typographic points; earlier ones are preferred.
_OFFSETS = [
    (x, y)
    for far in (5, 14, 24, 36, 50)
    for y in (-far, far)
    for x in (6, -6, far, -far)
]  # fmt: skip
_ABOVE = [(x, y) for x, y in _OFFSETS if y > 0 > x]  # left of a rising line
_BELOW = [(x, y) for x, y in _OFFSETS if y < 0 < x]
_RADIUS = 5  # pixels around a point that a label should leave free
_STEP = 4  # pixels between the places of a line that a label should leave free


@dataclass(frozen=True)
class PointLabel:
    """A text for a point in the data's coordinates.

    `side` keeps it above or below: of two lines close together, each needs its own.
    """

    x: float
    y: float
    text: str
    colour: str
    side: Literal["above", "below"] | None = None

    def offsets(self) -> list[tuple[int, int]]:
        """Return the places where the label may be, in points from its point."""
        sides = {None: _OFFSETS, "above": _ABOVE, "below": _BELOW}
        return sides[self.side]


def label_points(axes: Any, labels: Sequence[PointLabel]) -> None:
    """Write each label beside its point, where it covers least of the points and other labels.

    Call it last: the limits of the axes must be final.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # only then does the layout have its sizes
    frame = axes.get_window_extent()
    taken = list(_drawn(axes))
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        taken.append(Bbox.from_extents(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS))
    for label in labels:
        notes = [_note(axes, label, offset) for offset in label.offsets()]
        boxes = [note.get_window_extent() for note in notes]
        costs = [_covered(box, taken) + _outside(box, frame) for box in boxes]
        best = min(range(len(notes)), key=costs.__getitem__)
        taken.append(boxes[best])
        for index, note in enumerate(notes):
            if index != best:
                note.remove()


def _drawn(axes: Any) -> Iterator[Any]:
    """Yield boxes of the texts, and small ones along every line and interval, in pixels."""
    from matplotlib.transforms import Bbox

    yield from (text.get_window_extent() for text in axes.texts)
    paths = [line.get_xydata() for line in axes.lines]
    for collection in axes.collections:
        if hasattr(collection, "get_segments"):
            paths += collection.get_segments()
    for path in paths:
        pixels = axes.transData.transform(path)
        for (x0, y0), (x1, y1) in pairwise(pixels):
            steps = 1 + int(math.hypot(x1 - x0, y1 - y0) / _STEP)
            for x, y in np.linspace((x0, y0), (x1, y1), steps):
                yield Bbox.from_extents(x - 1, y - 1, x + 1, y + 1)


def _note(axes: Any, label: PointLabel, offset: tuple[int, int]) -> Any:
    return axes.annotate(
        plain(label.text),
        (label.x, label.y),
        offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right",
        va="bottom" if offset[1] > 0 else "top",
        color=label.colour,
        annotation_clip=False,
    )


def _covered(box: Any, taken: Sequence[Any]) -> float:
    """Return the area that a box shares with those that are taken, in square pixels."""
    width = [max(0.0, min(box.x1, other.x1) - max(box.x0, other.x0)) for other in taken]
    height = [max(0.0, min(box.y1, other.y1) - max(box.y0, other.y0)) for other in taken]
    return sum(w * h for w, h in zip(width, height, strict=True))


def _outside(box: Any, frame: Any) -> float:
    """Return the area of a box outside the frame, in square pixels."""
    return float(box.width * box.height - _covered(box, [frame]))
