"""BoNBoN: the quality of best-of-n at the cost of one draw, with proof.

Names are imported when they are first used, so that `import bonbon` loads neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    __version__: str
    from bonbon.config.run import RunConfig as RunConfig
    from bonbon.config.run import load_config as load_config
    from bonbon.config.sampling import SamplingConfig as SamplingConfig
    from bonbon.decoding.api import generate as generate
    from bonbon.evaluation.evaluator import Evaluator as Evaluator
    from bonbon.groups.group import Group as Group
    from bonbon.groups.group import Groups as Groups
    from bonbon.groups.shards import open_groups as open_groups
    from bonbon.groups.shards import read_groups as read_groups
    from bonbon.rewards.model import RewardModel as RewardModel
    from bonbon.rewards.reward import FunctionReward as FunctionReward
    from bonbon.rewards.reward import WeightedSum as WeightedSum
    from bonbon.sampling.transformers import TransformersSampler as TransformersSampler
    from bonbon.system.errors import BonbonError as BonbonError
    from bonbon.tilt.best_of_n import BestOfN as BestOfN
    from bonbon.tilt.best_of_n import WorstOfN as WorstOfN
    from bonbon.tilt.exponential import ExponentialTilt as ExponentialTilt
    from bonbon.training.arguments import BoNBoNConfig as BoNBoNConfig
    from bonbon.training.trainer import BoNBoNTrainer as BoNBoNTrainer

_HOMES = {
    "BestOfN": "tilt.best_of_n",
    "BoNBoNConfig": "training.arguments",
    "BoNBoNTrainer": "training.trainer",
    "BonbonError": "system.errors",
    "Evaluator": "evaluation.evaluator",
    "ExponentialTilt": "tilt.exponential",
    "FunctionReward": "rewards.reward",
    "Group": "groups.group",
    "Groups": "groups.group",
    "RewardModel": "rewards.model",
    "RunConfig": "config.run",
    "SamplingConfig": "config.sampling",
    "TransformersSampler": "sampling.transformers",
    "WeightedSum": "rewards.reward",
    "WorstOfN": "tilt.best_of_n",
    "generate": "decoding.api",
    "load_config": "config.run",
    "open_groups": "groups.shards",
    "read_groups": "groups.shards",
}
__all__ = ["__version__", *_HOMES]
_get = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":  # read when it is asked for: the look-up takes a while
        from bonbon.system.version import installed_version

        return installed_version()
    return _get(name)
