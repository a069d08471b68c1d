"""Estimators of win rate, KL, drift and forgetting, with confidence intervals.

Names are imported at first use, so that only the KLs load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.evaluation.best_of_k import BestOfK as BestOfK
    from bonbon.evaluation.best_of_k import best_of_k_curve as best_of_k_curve
    from bonbon.evaluation.best_of_k import best_of_k_means as best_of_k_means
    from bonbon.evaluation.best_of_k import best_of_k_weights as best_of_k_weights
    from bonbon.evaluation.best_of_k import best_of_k_win_rates as best_of_k_win_rates
    from bonbon.evaluation.best_of_k import best_of_n_win_rate as best_of_n_win_rate
    from bonbon.evaluation.drift import drift_at_equal_win_rate as drift_at_equal_win_rate
    from bonbon.evaluation.drift import drift_from_base as drift_from_base
    from bonbon.evaluation.efficiency import kl_efficiency as kl_efficiency
    from bonbon.evaluation.evaluator import Evaluator as Evaluator
    from bonbon.evaluation.figures import Figure as Figure
    from bonbon.evaluation.figures import bootstrap as bootstrap
    from bonbon.evaluation.figures import clustered_mean as clustered_mean
    from bonbon.evaluation.human_text import TextLosses as TextLosses
    from bonbon.evaluation.human_text import bits_per_byte as bits_per_byte
    from bonbon.evaluation.human_text import forgetting as forgetting
    from bonbon.evaluation.human_text import human_text_losses as human_text_losses
    from bonbon.evaluation.human_text import perplexity as perplexity
    from bonbon.evaluation.kl import CompletionKLs as CompletionKLs
    from bonbon.evaluation.kl import completion_kls as completion_kls
    from bonbon.evaluation.length_control import LengthControlled as LengthControlled
    from bonbon.evaluation.length_control import (
        length_controlled_win_rate as length_controlled_win_rate,
    )
    from bonbon.evaluation.results import Draws as Draws
    from bonbon.evaluation.results import Evaluation as Evaluation
    from bonbon.evaluation.results import ModelEvaluation as ModelEvaluation
    from bonbon.evaluation.win_rates import WinRate as WinRate
    from bonbon.evaluation.win_rates import paired_difference as paired_difference
    from bonbon.evaluation.win_rates import win_rate as win_rate
    from bonbon.evaluation.win_rates import win_rate_figure as win_rate_figure
    from bonbon.evaluation.win_rates import win_rate_over_prompts as win_rate_over_prompts
    from bonbon.evaluation.win_rates import win_rate_variance as win_rate_variance

_HOMES = {
    "BestOfK": "best_of_k",
    "CompletionKLs": "kl",
    "Draws": "results",
    "Evaluation": "results",
    "Evaluator": "evaluator",
    "Figure": "figures",
    "LengthControlled": "length_control",
    "ModelEvaluation": "results",
    "TextLosses": "human_text",
    "WinRate": "win_rates",
    "best_of_k_curve": "best_of_k",
    "best_of_k_means": "best_of_k",
    "best_of_k_weights": "best_of_k",
    "best_of_k_win_rates": "best_of_k",
    "best_of_n_win_rate": "best_of_k",
    "bits_per_byte": "human_text",
    "bootstrap": "figures",
    "clustered_mean": "figures",
    "completion_kls": "kl",
    "drift_at_equal_win_rate": "drift",
    "drift_from_base": "drift",
    "forgetting": "human_text",
    "human_text_losses": "human_text",
    "kl_efficiency": "efficiency",
    "length_controlled_win_rate": "length_control",
    "paired_difference": "win_rates",
    "perplexity": "human_text",
    "win_rate": "win_rates",
    "win_rate_figure": "win_rates",
    "win_rate_over_prompts": "win_rates",
    "win_rate_variance": "win_rates",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
