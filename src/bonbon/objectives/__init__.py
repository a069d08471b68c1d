"""Training objectives: pure functions of log-probabilities summed over tokens, one an objective.

A log-probability is ln π(y | x), summed over the completion's tokens in nats, under the policy
being trained or under the base model (`ref_…`). Objectives of a pair take tensors of shape
(groups,), one for each side (`best`, `worst`, `chosen`, `rejected`); objectives of all ranks take
`logps`, `ref_logps` and `rewards` of shape (groups, m). Each returns losses of shape (groups,); the
caller averages. Nothing is divided by a length, and no objective has modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.objectives.catalogue import OBJECTIVES as OBJECTIVES
    from bonbon.objectives.catalogue import GroupLogps as GroupLogps
    from bonbon.objectives.catalogue import Objective as Objective
    from bonbon.objectives.catalogue import ObjectiveSettings as ObjectiveSettings
    from bonbon.objectives.catalogue import group_metrics as group_metrics
    from bonbon.objectives.pairs import PAPER_ALPHA as PAPER_ALPHA
    from bonbon.objectives.pairs import bon_beta as bon_beta
    from bonbon.objectives.pairs import bon_target as bon_target
    from bonbon.objectives.pairs import bonbon as bonbon
    from bonbon.objectives.pairs import bonbon_dpo as bonbon_dpo
    from bonbon.objectives.pairs import dpo as dpo
    from bonbon.objectives.pairs import ipo as ipo
    from bonbon.objectives.pairs import ipo_bon as ipo_bon
    from bonbon.objectives.pairs import sft_bon as sft_bon
    from bonbon.objectives.ranks import bonbon_ranks as bonbon_ranks
    from bonbon.objectives.ranks import centred_targets as centred_targets
    from bonbon.objectives.ranks import log_density_targets as log_density_targets
    from bonbon.objectives.ranks import pairwise_regression as pairwise_regression
    from bonbon.objectives.ranks import rank_regression as rank_regression
    from bonbon.objectives.ranks import rank_regression_huber as rank_regression_huber
    from bonbon.objectives.ranks import rank_regression_pointwise as rank_regression_pointwise
    from bonbon.objectives.ranks import tie_weights as tie_weights
    from bonbon.objectives.ranks import weighted_sft as weighted_sft

_HOMES = {
    "OBJECTIVES": "catalogue",
    "GroupLogps": "catalogue",
    "Objective": "catalogue",
    "ObjectiveSettings": "catalogue",
    "PAPER_ALPHA": "pairs",
    "bon_beta": "pairs",
    "bon_target": "pairs",
    "bonbon": "pairs",
    "bonbon_dpo": "pairs",
    "bonbon_ranks": "ranks",
    "centred_targets": "ranks",
    "dpo": "pairs",
    "group_metrics": "catalogue",
    "ipo": "pairs",
    "ipo_bon": "pairs",
    "log_density_targets": "ranks",
    "pairwise_regression": "ranks",
    "rank_regression": "ranks",
    "rank_regression_huber": "ranks",
    "rank_regression_pointwise": "ranks",
    "sft_bon": "pairs",
    "tie_weights": "ranks",
    "weighted_sft": "ranks",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
