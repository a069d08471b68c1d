"""The objective's metrics, averaged over the groups between two lines of the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from bonbon.objectives.catalogue import GroupLogps, group_metrics


class MetricSums:
    """Sums of `group_metrics` over groups, apart for training (`train`) and evaluation (`eval`).

    Every process has the same names in the same order, so that their sums can be added up.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def add(self, mode: str, logps: GroupLogps, counts: bool) -> None:
        """Add the metrics of groups; those that do not count add 0, and only their names."""
        sums = self._sums.setdefault(mode, defaultdict(float))
        sums["groups"] += len(logps.rewards) * counts
        for name, values in group_metrics(logps).items():
            sums[name] += float(values.double().sum()) * counts

    def pop_means(
        self, mode: str, add_up: Callable[[list[float]], list[float]]
    ) -> dict[str, float]:
        """Return each metric's mean over the groups added since the last call, and start over.

        `add_up` adds this process' sums to those of the others.
        """
        sums = self._sums.pop(mode, {})
        if not sums:
            return {}
        groups, *totals = add_up(list(sums.values()))
        _, *names = sums
        return {name: total / groups for name, total in zip(names, totals, strict=True)}
