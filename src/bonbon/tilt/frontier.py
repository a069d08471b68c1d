"""The table of best-of-n's win rate and KL, and the optimum for either."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bonbon.system.errors import BonbonError
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.exponential import optimal_kl, optimal_win_rate


def parse_ns(text: str) -> list[float]:
    """Parse '2,4,8' as numbers. Raises BonbonError for anything but finite numbers ≥ 1."""
    ns = []
    for part in text.split(","):
        try:
            n = float(part)
        except ValueError:
            n = math.nan
        if not (math.isfinite(n) and n >= 1):
            raise BonbonError(
                f"--n {text!r}: {part.strip()!r} is not a number >= 1; write e.g. 2,4,8"
            )
        ns.append(int(n) if n.is_integer() else n)
    return ns


def frontier_rows(ns: Sequence[float]) -> list[dict[str, float | None]]:
    """Compute a row for each n: win rate and KL (nats) of best-of-n, and the optimum for either.

    `ipo_target` is BoNBoN's target (n−1)(ψ(n) − ψ(1)), None where n is not an integer.
    """
    rows: list[dict[str, float | None]] = []
    for n in ns:
        tilt = BestOfN(n)
        win, kl = tilt.win_rate(), tilt.kl()
        rows.append(
            {
                "n": n,
                "win_rate": win,
                "kl": kl,
                "optimal_win_rate_at_kl": float(optimal_win_rate(kl)),
                "least_kl_for_win_rate": float(optimal_kl(win)),
                "ipo_target": _target(tilt),
            }
        )
    return rows


def _target(tilt: BestOfN) -> float | None:
    n = int(tilt.n)
    return float(tilt.rank_log_ratio(n, 1, n)) if n == tilt.n else None
