"""Planning a cluster: how many GPUs sample and how many score, for how many hours and what money.

`settings` is the file that is read, `estimates` the arithmetic on paper, `work` the seconds of each
shard, `line` the simulation, `splits` the choice, `shown` its words and tables. Loads no torch.
"""

from bonbon.planning.cluster.config import ClusterConfig, load_cluster
from bonbon.planning.cluster.splits import (
    ClusterPlan,
    Estimate,
    Split,
    plan_cluster,
    plan_from_files,
)

__all__ = [
    "ClusterConfig",
    "ClusterPlan",
    "Estimate",
    "Split",
    "load_cluster",
    "plan_cluster",
    "plan_from_files",
]
