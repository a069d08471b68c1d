"""Best-of-n at inference time: strategies that spend n draws on one answer.

    bonbon.generate(prompts, model, reward, strategy="best_of_n")

A strategy is an immutable settings object (`SpeculativeRejection(alpha=0.5)`); `STRATEGIES` lists
them by name. Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.decoding.adaptive import AdaptiveN as AdaptiveN
    from bonbon.decoding.api import generate as generate
    from bonbon.decoding.best_of_n import BestOfN as BestOfN
    from bonbon.decoding.catalogue import STRATEGIES as STRATEGIES
    from bonbon.decoding.catalogue import parse_strategy as parse_strategy
    from bonbon.decoding.fitting import fit_beta as fit_beta
    from bonbon.decoding.regularised import RBoNKL as RBoNKL
    from bonbon.decoding.regularised import RBoNLength as RBoNLength
    from bonbon.decoding.regularised import RBoNWD as RBoNWD
    from bonbon.decoding.regularised import SRBoNKL as SRBoNKL
    from bonbon.decoding.regularised import SRBoNWD as SRBoNWD
    from bonbon.decoding.smc import SMC as SMC
    from bonbon.decoding.soft import BestOfPoisson as BestOfPoisson
    from bonbon.decoding.soft import SoftBestOfN as SoftBestOfN
    from bonbon.decoding.source import LocalSource as LocalSource
    from bonbon.decoding.speculative_rejection import SpeculativeRejection as SpeculativeRejection
    from bonbon.decoding.strategy import Generation as Generation
    from bonbon.decoding.strategy import Source as Source
    from bonbon.decoding.strategy import Strategy as Strategy
    from bonbon.decoding.strategy import WholeDraws as WholeDraws
    from bonbon.decoding.tree import TreeBoN as TreeBoN
    from bonbon.decoding.voting import RewardWeightedVote as RewardWeightedVote
    from bonbon.decoding.voting import SelfConsistency as SelfConsistency
    from bonbon.decoding.voting import ShortestMajorityVote as ShortestMajorityVote
    from bonbon.sampling.cost import Candidates as Candidates
    from bonbon.sampling.cost import Cost as Cost

_HOMES = {
    "AdaptiveN": "adaptive",
    "BestOfN": "best_of_n",
    "BestOfPoisson": "soft",
    "Candidates": "strategy",
    "Cost": "strategy",
    "Generation": "strategy",
    "LocalSource": "source",
    "RBoNKL": "regularised",
    "RBoNLength": "regularised",
    "RBoNWD": "regularised",
    "RewardWeightedVote": "voting",
    "SMC": "smc",
    "SRBoNKL": "regularised",
    "SRBoNWD": "regularised",
    "STRATEGIES": "catalogue",
    "SelfConsistency": "voting",
    "ShortestMajorityVote": "voting",
    "SoftBestOfN": "soft",
    "Source": "strategy",
    "SpeculativeRejection": "speculative_rejection",
    "Strategy": "strategy",
    "TreeBoN": "tree",
    "WholeDraws": "strategy",
    "fit_beta": "fitting",
    "generate": "api",
    "parse_strategy": "catalogue",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
