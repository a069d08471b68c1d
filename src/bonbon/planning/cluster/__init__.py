"""Plans of a cluster: how many GPUs sample and how many score, the hours and the cost.

`settings` reads the YAML file, `estimates` holds the arithmetic, `work` gives the seconds of each
shard, `line` is the simulation, `splits` chooses, `shown` prints. Loads no torch.
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
