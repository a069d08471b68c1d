"""Figures that compare policies with the base model and with best-of-n.

A policy is represented by draws for each prompt, with a weight on each draw: equal weights for a
model, the weights of the tilt's ranks for best-of-N. Every figure is a mean over prompts of such
weighted means, or a ratio of such means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.best_of_k import (
    BestOfK,
    best_of_k_curve,
    best_of_k_weights,
    best_of_k_win_rates,
)
from bonbon.evaluation.drift import (
    COMPLETION_METRICS,
    GroupMetric,
    drift_at_equal_win_rate,
    drift_from_base,
    metrics_for,
)
from bonbon.evaluation.efficiency import kl_efficiency, recovered_share
from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.evaluation.group_values import (
    best_draw,
    check_draws,
    exact_best_of_n_kl,
    kl_estimates,
    metric_of,
    rewards_of,
    weighted_means,
)
from bonbon.evaluation.length_control import length_controlled_win_rate
from bonbon.evaluation.results import BestOfNKL, Draws, ModelEvaluation, PairEvaluation
from bonbon.evaluation.win_rates import paired_difference, win_rate_figure
from bonbon.groups.group import Group
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.discrete import best_of_n_kl_estimate


@dataclass(frozen=True)
class Evaluator:
    """Evaluates policies on the same prompts against the same base completions.

    Args:
        base: one scored group a prompt from the base model, of k + n completions (ValueError for
            fewer). Policies are compared with the first k; best-of-n's figures use all of them.
        n: of best-of-n.
        k: completions of each model a prompt.
        resamples: of the bootstrap.
        rewards: names of the groups' further rewards, never trained on.
        metrics: names of the groups' further off-target metrics.
    """

    base: Sequence[Group]
    n: int
    k: int
    resamples: int = 2000
    rewards: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_draws(self.base, self.k + self.n, "base")

    # --- whole evaluations ------------------------------------------------------------------------

    def best_of_n(self) -> ModelEvaluation:
        """Evaluate best-of-n; its KL is the closed form, an upper bound if draws tie or repeat."""
        wins, tilt = self._best_of_n_wins[""], BestOfN(self.n)
        kl = tilt.kl()
        lengths = weighted_means(self.base, Group.lengths)
        weights = self._best_of_n_weights
        chosen = weighted_means(self.base, Group.lengths, weights)
        return ModelEvaluation(
            win_rate=win_rate_figure(wins, self.resamples),
            kl=Figure.exact(kl),
            recovered=Figure.exact(1.0),
            kl_efficiency=self._figure(lambda win: kl_efficiency(win, kl), wins),
            length=self._mean(chosen),
            length_change=self._mean(chosen - lengths),
            tokens_per_answer=self._mean(self.n * lengths),
            win_rate_by={
                name: win_rate_figure(self._best_of_n_wins[name], self.resamples)
                for name in self.rewards
            },
            win_rate_loss_by={
                name: paired_difference(wins, self._best_of_n_wins[name], self.resamples)
                for name in self.rewards
            },
            best_of=self.n,
            # KL(base ‖ best-of-n) = −∫ ln(n u^(n−1)) du
            forward_kl={"closed_form": Figure.exact(self.n - 1 - float(np.log(self.n)))},
            **self._drift(self._best_of_n_metrics),
        )

    def base_model(self) -> ModelEvaluation:
        """Evaluate the base model against itself."""
        half, nothing = Figure.exact(0.5), Figure.exact(0.0)
        lengths = self._mean(weighted_means(self.base, Group.lengths))
        return ModelEvaluation(
            win_rate=half,
            kl=nothing,
            recovered=nothing,
            kl_efficiency=None,
            length=lengths,
            length_change=nothing,
            tokens_per_answer=lengths,
            win_rate_by=dict.fromkeys(self.rewards, half),
            length_controlled_win_rate=half,
            metrics={name: self._mean(values) for name, values in self._base_metrics.items()},
        )

    def model(self, draws: Draws) -> ModelEvaluation:
        """Evaluate a policy from its scored groups; KLs from their `kl`, `kl_plain`, `kl_k3`.

        *recovered* = (win − ½)/(best-of-n's win − ½); *KL efficiency* = the least KL of
        a rank-based tilt with this win rate / the measured KL (0 for a win rate of ½ or less).
        Raises ValueError when the prompts are not the base groups' prompts, in their order.
        """
        groups, weights = draws.groups, self._weights(draws)
        wins = self.wins(draws)
        lengths = weighted_means(groups, Group.lengths, weights)
        kls = self._kls(draws, weights)
        kl = kls.get("rao_blackwellised", kls.get("plain"))
        drawn = draws.best_of * weighted_means(groups, Group.lengths)
        return ModelEvaluation(
            win_rate=win_rate_figure(wins, self.resamples),
            kl=None if kl is None else self._mean(kl),
            recovered=self._figure(recovered_share, wins, self._best_of_n_wins[""]),
            kl_efficiency=None if kl is None else self._figure(kl_efficiency, wins, kl),
            length=self._mean(lengths),
            length_change=self._mean(lengths - weighted_means(self.base, Group.lengths)),
            tokens_per_answer=self._mean(drawn),
            win_rate_by={
                name: win_rate_figure(self.wins(draws, name), self.resamples)
                for name in self.rewards
            },
            win_rate_loss_by={
                name: paired_difference(wins, self.wins(draws, name), self.resamples)
                for name in self.rewards
            },
            tie_rate=self._mean(self._ties(draws)),
            best_of=draws.best_of if draws.best_of > 1 else None,
            kl_estimates={name: self._mean(values) for name, values in kls.items()},
            forward_kl=self._forward_kl(draws),
            **self._drift(self._metrics_of(draws)),
        )

    # --- figures of several policies --------------------------------------------------------------

    def length_controlled(self, policies: Mapping[str, Draws]) -> dict[str, Figure]:
        """Compute length-controlled win rates against the base (AlpacaEval 2), fitted jointly.

        The j-th draw of a policy is compared with the base's j-th; the best of several draws is
        compared with each of the base's k draws. Lengths are in tokens.
        """
        answers = [self._answers(draws) for draws in policies.values()]
        base = self._opponents.groups
        difference = np.stack([rewards for rewards, _ in answers]) - [
            rewards_of(group) for group in base
        ]
        fitted = length_controlled_win_rate(
            (difference > 0) + 0.5 * (difference == 0),
            np.stack([lengths for _, lengths in answers]),
            np.array([group.lengths() for group in base]),
        )
        return dict(zip(policies, fitted.win_rates, strict=True))

    def _answers(self, draws: Draws) -> tuple[Floats, Floats]:
        """Return rewards and lengths of k answers: the first k draws, or k times the best one."""
        groups = [
            group.part(0, self.k) if draws.best_of == 1 else best_draw(group, draws.best_of)
            for group in draws.groups
        ]
        shape = (len(groups), self.k)
        rewards = np.broadcast_to([rewards_of(group) for group in groups], shape)
        return rewards, np.broadcast_to([group.lengths() for group in groups], shape)

    def pairs(self, policies: Mapping[str, Draws]) -> list[PairEvaluation]:
        """Compare every pair of policies on the same prompts."""
        names = list(policies)
        return [
            PairEvaluation(
                first,
                second,
                win_rate_figure(
                    self._wins_between(policies[first], policies[second]), self.resamples
                ),
                paired_difference(
                    self.wins(policies[first]), self.wins(policies[second]), self.resamples
                ),
            )
            for index, first in enumerate(names)
            for second in names[index + 1 :]
        ]

    def drift_at(self, draws: Draws, win_rate: float) -> dict[str, Figure | None]:
        """Return each metric's drift for the mixture with the base that has this win rate."""
        return self._drift_at(self._metrics_of(draws), self.wins(draws), win_rate)

    def best_of_n_drift_at(self, win_rate: float) -> dict[str, Figure | None]:
        """Return `drift_at` for best-of-n."""
        return self._drift_at(self._best_of_n_metrics, self._best_of_n_wins[""], win_rate)

    def _drift_at(
        self, metrics: Mapping[str, Floats], wins: Floats, win_rate: float
    ) -> dict[str, Figure | None]:
        base = self._base_metrics
        return {
            name: drift_at_equal_win_rate(values, base[name], wins, win_rate, self.resamples)
            for name, values in metrics.items()
        }

    def best_of_k(self, beyond: Sequence[int] = ()) -> list[BestOfK]:
        """Return the base model's best-of-k for k = 1..n, and extrapolated to the k in `beyond`."""
        return best_of_k_curve(
            [rewards_of(group) for group in self.base],
            self.n,
            further={
                name: [rewards_of(group, name) for group in self.base] for name in self.rewards
            },
            beyond=beyond if self.n >= 4 else (),
            resamples=self.resamples,
        )

    def best_of_n_kl(self) -> BestOfNKL:
        """Return bound, estimate and exact value of best-of-n's KL.

        Beirami et al. 2024, arXiv 2401.01879.
        """
        estimates = weighted_means(
            self.base,
            lambda group: best_of_n_kl_estimate(group.logprobs, self.n),
            self._best_of_n_weights,
        )
        exact = [exact_best_of_n_kl(group, self.n) for group in self.base]
        known = [kl for kl in exact if kl is not None]
        return BestOfNKL(
            bound=BestOfN(self.n).kl(),
            beirami=self._mean(estimates),
            exact=float(np.mean(known)) if len(known) == len(exact) else None,
        )

    # --- per prompt -------------------------------------------------------------------------------

    def wins(self, draws: Draws, reward: str = "") -> Floats:
        """Return the policy's win rate against the base's first k draws, shape (prompts,)."""
        return self._wins_between(draws, self._opponents, reward)

    @property
    def best_of_n_draws(self) -> Draws:
        """The base's best of n, from draws other than the k it is compared with."""
        return Draws([group.part(self.k, self.k + self.n) for group in self.base], self.n)

    @cached_property
    def _best_of_n_weights(self) -> list[Floats]:
        """The probability that each of the base's draws is the best of n."""
        return [best_of_k_weights(rewards_of(group))[self.n - 1] for group in self.base]

    @cached_property
    def _opponents(self) -> Draws:
        return Draws([group.part(0, self.k) for group in self.base])

    def _ties(self, draws: Draws) -> Floats:
        """Return the share of pairs with the base's first k that tie, shape (prompts,)."""
        columns = (draws.groups, self._opponents.groups, self._weights(draws))
        return np.array(
            [
                float(own @ (rewards_of(g)[:, None] == rewards_of(base)).mean(axis=1))
                for g, base, own in zip(*columns, strict=True)
            ]
        )

    def _wins_between(self, ours: Draws, theirs: Draws, reward: str = "") -> Floats:
        def wins(group: Group, other: Group, own: Floats, against: Floats) -> float:
            difference = np.subtract.outer(rewards_of(group, reward), rewards_of(other, reward))
            return float(own @ ((difference > 0) + 0.5 * (difference == 0)) @ against)

        columns = (ours.groups, theirs.groups, self._weights(ours), self._weights(theirs))
        return np.array([wins(*prompt) for prompt in zip(*columns, strict=True)])

    def _weights(self, draws: Draws) -> list[Floats]:
        """Return the probability that each of a group's draws is the policy's answer."""
        check_draws(draws.groups, self.k if draws.best_of == 1 else draws.best_of, "model")
        if [group.prompt_id for group in draws.groups] != [group.prompt_id for group in self.base]:
            raise ValueError("the model's groups and the base's are of different prompts")
        if draws.best_of == 1:
            return [np.full(group.n, 1.0 / group.n) for group in draws.groups]
        return [best_of_k_weights(rewards_of(group))[draws.best_of - 1] for group in draws.groups]

    @cached_property
    def _best_of_n_wins(self) -> dict[str, Floats]:
        """Best-of-n's win rates against a further draw by each reward, shape (prompts,)."""
        return {
            name: np.array(
                [
                    best_of_k_win_rates(rewards_of(group), rewards_of(group, name))[self.n - 1]
                    for group in self.base
                ]
            )
            for name in ("", *self.rewards)
        }

    def _metric_values(
        self, groups: Sequence[Group], weights: Sequence[Floats] | None = None, whole: bool = True
    ) -> dict[str, Floats]:
        """Return every off-target metric, shape (prompts,); group metrics only if `whole`."""
        metrics = {
            name: weighted_means(groups, metric.function, weights)
            for name, metric in COMPLETION_METRICS.items()
        }
        metrics |= {
            name: weighted_means(groups, partial(metric_of, name), weights) for name in self.metrics
        }
        if whole:
            metrics |= {
                name: metric.per_prompt(groups, self.k)
                for name, metric in metrics_for(self.k).items()
                if isinstance(metric, GroupMetric)
            }
        return metrics

    @cached_property
    def _base_metrics(self) -> dict[str, Floats]:
        return self._metric_values(self.base)

    @cached_property
    def _best_of_n_metrics(self) -> dict[str, Floats]:
        return self._metric_values(self.base, self._best_of_n_weights, whole=False)

    def _metrics_of(self, draws: Draws) -> dict[str, Floats]:
        """Return a policy's metrics, cached: self-BLEU of thousands of groups takes seconds."""
        if draws not in self._metric_cache:
            weights, whole = self._weights(draws), draws.best_of == 1
            self._metric_cache[draws] = self._metric_values(draws.groups, weights, whole)
        return self._metric_cache[draws]

    @cached_property
    def _metric_cache(self) -> dict[Draws, dict[str, Floats]]:
        return {}

    def _drift(self, ours: Mapping[str, Floats]) -> dict[str, Any]:
        return {
            "metrics": {name: self._mean(values) for name, values in ours.items()},
            "drift": {
                name: drift_from_base(values, self._base_metrics[name], resamples=self.resamples)
                for name, values in ours.items()
            },
        }

    def _kls(self, draws: Draws, weights: Sequence[Floats]) -> dict[str, Floats]:
        """Return the available estimates of KL(policy ‖ base), shape (prompts,).

        Best-of-N of a model M has KL(M_N ‖ M) + E_{M_N}[ln M/π0]: the closed form, plus the plain
        log-ratio of its answers.
        """
        estimates = kl_estimates(draws.groups, weights)
        if draws.best_of == 1:
            return estimates
        return (
            {"plain": estimates["plain"] + BestOfN(draws.best_of).kl()}
            if "plain" in estimates
            else {}
        )

    def _forward_kl(self, draws: Draws) -> dict[str, Figure] | None:
        """Return the estimates of KL(base ‖ policy); None if not measured, or infinite."""
        if draws.forward is None or draws.best_of > 1:
            return None
        estimates = kl_estimates(draws.forward)
        return {name: self._mean(values) for name, values in estimates.items()} or None

    def _mean(self, per_prompt: Floats) -> Figure:
        return self._figure(lambda mean: mean, per_prompt)

    def _figure(self, statistic: Callable[..., ArrayLike], *per_prompt: Floats) -> Figure:
        return bootstrap(per_prompt, statistic, self.resamples)
