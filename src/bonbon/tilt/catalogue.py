"""The tilts that a training can aim at, by name; each is built from n."""

from __future__ import annotations

from collections.abc import Callable

from bonbon.tilt.base import Tilt
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.exponential import ExponentialTilt

# Each maps n to the tilt that has that name in a configuration.
TILTS: dict[str, Callable[[float], Tilt]] = {
    "best_of_n": BestOfN,
    "optimal": lambda n: ExponentialTilt.with_win_rate(BestOfN(n).win_rate()),
    "worst_of_n": WorstOfN,
}
