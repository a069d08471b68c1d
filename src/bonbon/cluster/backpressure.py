"""Back-pressure by the number of shards that wait between two stages.

Ray Data limits an operator by the bytes of its output in the object store. Here the rows are
numbers, so samplers would run ahead of the scorers without limit; this policy counts rows instead.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

POLICIES = ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
AHEAD = 2  # shards that may wait for each worker of the stage that comes next


class FewWait(BackpressurePolicy):
    """A policy that starts no row while `AHEAD` rows wait for each worker of the next stage."""

    def can_add_input(self, op: Any) -> bool:
        """Return whether `op` may start another row."""
        return all(self._has_room(following) for following in op.output_dependencies)

    def _has_room(self, op: Any) -> bool:
        pools = op.get_autoscaling_actor_pools()
        workers = sum(it.num_running_actors() - it.num_restarting_actors() for it in pools)
        # With no worker alive, waiting could take forever: a worker may need what these hold.
        waiting: int = self._topology[op].total_enqueued_input_blocks()
        return not workers or waiting < AHEAD * workers


def policies() -> list[type[BackpressurePolicy]]:
    """Return Ray Data's own policies and this one."""
    return [*ENABLED_BACKPRESSURE_POLICIES, FewWait]
