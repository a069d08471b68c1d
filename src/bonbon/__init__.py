"""BoNBoN: the quality of best-of-n at the cost of one draw, with proof.

Names are imported when they are first used, so that `import bonbon` loads neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bonbon.config import RunConfig as RunConfig
    from bonbon.config import SamplingConfig as SamplingConfig
    from bonbon.config import load_config as load_config
    from bonbon.decoding import generate as generate
    from bonbon.errors import BonbonError as BonbonError
    from bonbon.evaluation import Evaluator as Evaluator
    from bonbon.groups import Group as Group
    from bonbon.groups import Groups as Groups
    from bonbon.groups import open_groups as open_groups
    from bonbon.groups import read_groups as read_groups
    from bonbon.reward import FunctionReward as FunctionReward
    from bonbon.reward import RewardModel as RewardModel
    from bonbon.reward import WeightedSum as WeightedSum
    from bonbon.sampling import TransformersSampler as TransformersSampler
    from bonbon.tilt import BestOfN as BestOfN
    from bonbon.tilt import ExponentialTilt as ExponentialTilt
    from bonbon.tilt import WorstOfN as WorstOfN
    from bonbon.trainer import BoNBoNConfig as BoNBoNConfig
    from bonbon.trainer import BoNBoNTrainer as BoNBoNTrainer

_HOMES = {
    "BestOfN": "tilt",
    "BoNBoNConfig": "trainer",
    "BoNBoNTrainer": "trainer",
    "BonbonError": "errors",
    "Evaluator": "evaluation",
    "ExponentialTilt": "tilt",
    "FunctionReward": "reward",
    "Group": "groups",
    "Groups": "groups",
    "RewardModel": "reward",
    "RunConfig": "config",
    "SamplingConfig": "config",
    "TransformersSampler": "sampling",
    "WeightedSum": "reward",
    "WorstOfN": "tilt",
    "generate": "decoding",
    "load_config": "config",
    "open_groups": "groups",
    "read_groups": "groups",
}
__all__ = ["__version__", *_HOMES]
__getattr__ = lazy_names(__name__, _HOMES)
