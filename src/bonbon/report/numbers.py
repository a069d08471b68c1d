"""Formatting of numbers in a report."""

from __future__ import annotations

import math
from typing import NamedTuple

from bonbon.evaluation.figures import Figure

MISSING = "–"
# Factor, decimals and suffix; for other units the decimals depend on the size of the figure.
_UNITS = {
    "share": (100, 1, "%"),
    "points": (100, 1, ""),
    "nats": (1, 2, ""),
    "tokens": (1, 1, ""),
    "ratio": (1, 2, ""),
}


class Shown(NamedTuple):
    """A formatted figure; `interval` is empty if there is no sampling error."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


def number(value: float | None, digits: int = 0, signed: bool = False) -> str:
    """Format 1234.5 as 1,234.5, with a true minus sign; None and non-finite values as a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # no −0.0
    return text.replace("-", "−")


def shown(figure: Figure | None, unit: str, signed: bool = False) -> Shown:
    """Format a figure in its unit (share, points, nats, tokens, ratio, …), with its interval."""
    if figure is None:
        return Shown(MISSING)
    factor, digits, suffix = _UNITS.get(unit, (1, _digits(figure), ""))
    value, low, high = (
        number(factor * part, digits, signed) for part in (figure.value, figure.low, figure.high)
    )
    # An interval that prints like the value is left out.
    return Shown(value + suffix, "" if value == low == high else f"{low} to {high}")


def _digits(figure: Figure) -> int:
    """Return the decimals that give the interval's width two digits, or the value three."""
    width = figure.high - figure.low
    scale = width if width > 0 else abs(figure.value) / 10
    return max(0, min(6, 1 - math.floor(math.log10(scale)))) if scale > 0 else 0


def of_100(share: float) -> str:
    """Format 0.82 as "82", with a decimal if it would otherwise round to 0, 50 or 100."""
    whole = round(100 * share)
    blurred = whole in (0, 50, 100) and abs(100 * share - whole) >= 0.05
    return number(100 * share, 1 if blurred else 0)


def whole_share(share: float) -> str:
    """Format a share in whole per cent, with a decimal if it would otherwise round to 0 or 100."""
    return f"{number(100 * share, 1 if round(100 * share) in (0, 100) else 0)}%"


def in_brackets(figure: Figure, unit: str, signed: bool = False) -> str:
    """Format the interval for a sentence, with a space before it; empty if there is none."""
    interval = shown(figure, unit, signed).interval
    return f" (95% interval {interval})" if interval else ""


def duration(seconds: float | None) -> str:
    """Format seconds as 42 s, 3.5 min or 12.3 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    for limit, divisor, unit, digits in ((90, 1, "s", 0), (5400, 60, "min", 1)):
        if seconds < limit:
            return f"{number(seconds / divisor, digits)} {unit}"
    return f"{number(seconds / 3600, 1)} h"
