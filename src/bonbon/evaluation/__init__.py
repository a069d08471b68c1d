"""Estimators: what a policy gained, what it cost, and how sure that is.

Names are imported when they are first used, so that only the KLs load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.lazy import lazy_names

if TYPE_CHECKING:
    from bonbon.evaluation.evaluator import Evaluator as Evaluator
    from bonbon.evaluation.evaluator import ModelEvaluation as ModelEvaluation
    from bonbon.evaluation.evaluator import kl_efficiency as kl_efficiency
    from bonbon.evaluation.figures import Figure as Figure
    from bonbon.evaluation.figures import bootstrap as bootstrap
    from bonbon.evaluation.kl import completion_kls as completion_kls
    from bonbon.evaluation.win_rates import best_of_n_win_rate as best_of_n_win_rate
    from bonbon.evaluation.win_rates import win_rate as win_rate

_HOMES = {
    "Evaluator": "evaluator",
    "Figure": "figures",
    "ModelEvaluation": "evaluator",
    "best_of_n_win_rate": "win_rates",
    "bootstrap": "figures",
    "completion_kls": "kl",
    "kl_efficiency": "evaluator",
    "win_rate": "win_rates",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
