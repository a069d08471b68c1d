"""Tilts of the base model in reward-quantile space.

Let u in [0, 1] be the quantile of a completion's reward among the base model's completions for the
same prompt. A *tilt* is a density f on [0, 1]; the tilted policy is π(y) = π0(y) f(u(y)). Under the
base model u is uniform (for continuous rewards), so the tilted policy's win rate against the base
model is ∫ u f(u) du and its KL divergence from it is ∫ f(u) ln f(u) du, whatever the model, the
prompt or the reward. All KLs are in nats, all arithmetic is float64; nothing here needs torch.

Sources: Gui, Gârbacea, Veitch 2024 (arXiv 2406.00832): the tilt view, Theorem 1 (the optimal tilt)
and section 4 (BoNBoN's target). Beirami et al. 2024 (arXiv 2401.01879): discrete outcomes and the
KL estimator. Khalaf et al. 2025 (arXiv 2506.19248): best-of-Poisson.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.tilt.base import Identity as Identity
    from bonbon.tilt.base import Tilt as Tilt
    from bonbon.tilt.best_of_n import BestOfN as BestOfN
    from bonbon.tilt.best_of_n import WorstOfN as WorstOfN
    from bonbon.tilt.best_of_poisson import BestOfPoisson as BestOfPoisson
    from bonbon.tilt.catalogue import TILTS as TILTS
    from bonbon.tilt.discrete import best_of_n_bounds as best_of_n_bounds
    from bonbon.tilt.discrete import best_of_n_kl_estimate as best_of_n_kl_estimate
    from bonbon.tilt.discrete import best_of_n_pmf as best_of_n_pmf
    from bonbon.tilt.discrete import kl_pmf as kl_pmf
    from bonbon.tilt.discrete import tilted_pmf as tilted_pmf
    from bonbon.tilt.discrete import win_rate_pmf as win_rate_pmf
    from bonbon.tilt.exponential import ExponentialTilt as ExponentialTilt
    from bonbon.tilt.exponential import optimal_kl as optimal_kl
    from bonbon.tilt.exponential import optimal_win_rate as optimal_win_rate
    from bonbon.tilt.ranks import best_of_n_rank_weights as best_of_n_rank_weights
    from bonbon.tilt.ranks import rank_targets as rank_targets
    from bonbon.tilt.ranks import rank_weights as rank_weights

_HOMES = {
    "TILTS": "catalogue",
    "BestOfN": "best_of_n",
    "BestOfPoisson": "best_of_poisson",
    "ExponentialTilt": "exponential",
    "Identity": "base",
    "Tilt": "base",
    "WorstOfN": "best_of_n",
    "best_of_n_bounds": "discrete",
    "best_of_n_kl_estimate": "discrete",
    "best_of_n_pmf": "discrete",
    "best_of_n_rank_weights": "ranks",
    "kl_pmf": "discrete",
    "optimal_kl": "exponential",
    "optimal_win_rate": "exponential",
    "rank_targets": "ranks",
    "rank_weights": "ranks",
    "tilted_pmf": "discrete",
    "win_rate_pmf": "discrete",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
