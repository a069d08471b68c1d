"""Measuring a policy against the base model and against best-of-n itself.

Everything is computed per prompt first; a figure is the mean over prompts and its 95% interval
comes from a bootstrap over prompts, since completions of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel

from bonbon.batching import pad_rows, token_batches
from bonbon.groups import Group
from bonbon.logprobs import full_precision, last_logits
from bonbon.models import forward_batch_tokens
from bonbon.tilt import BestOfN, best_of_n_rank_weights, optimal_kl

Floats = NDArray[np.float64]

# At most this many logits of one model are held at once while KLs are computed (1 GiB in float32).
_LOGITS = 2**28


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Figure:
        """A figure known without sampling error."""
        return cls(value, value, value)


def bootstrap(
    per_prompt: Sequence[Floats],
    statistic: Callable[..., ArrayLike],
    resamples: int = 2000,
    seed: int = 0,
) -> Figure:
    """A statistic of means over prompts, with its percentile-bootstrap 95% interval over prompts.

    Args:
        per_prompt: arrays of shape (prompts,), resampled together.
        statistic: maps the arrays' means, each a scalar or of shape (resamples,), to values.
    """
    columns = np.stack([np.asarray(values, dtype=np.float64) for values in per_prompt])
    value = float(np.asarray(statistic(*columns.mean(axis=1))))
    generator = np.random.default_rng(seed)
    prompts = columns.shape[1]
    means = np.empty((len(columns), resamples))
    for b in range(resamples):
        means[:, b] = columns[:, generator.integers(0, prompts, prompts)].mean(axis=1)
    low, high = np.percentile(np.asarray(statistic(*means)), [2.5, 97.5])
    return Figure(value, float(low), float(high))


# --- win rates ------------------------------------------------------------------------------------


def win_rate(rewards: ArrayLike, base_rewards: ArrayLike) -> float:
    """P(reward > base reward) over all pairs of one prompt's completions, a tie counting half."""
    ours, base = np.asarray(rewards, dtype=np.float64), np.asarray(base_rewards, dtype=np.float64)
    difference = ours[:, None] - base[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def best_of_n_win_rate(selected_by: ArrayLike, judged_by: ArrayLike, n: int) -> float:
    """Win rate of best-of-n against one more draw, from m > n base completions of one prompt.

    The unbiased combinatorial estimator: the mean, over every opponent j and every n-subset of the
    other completions, of the win of the subset's best. Ties for the best share the choice evenly.

    Args:
        selected_by: the rewards that best-of-n chooses by, shape (m,).
        judged_by: the rewards that decide the win, shape (m,); often the same.
        n: the number of draws. Raises ValueError unless n < m.
    """
    chooser, judge = np.asarray(selected_by, np.float64), np.asarray(judged_by, np.float64)
    m = len(chooser)
    if not 1 <= n < m:
        raise ValueError(f"best-of-{n} against a further draw needs more than {n} draws, got {m}")
    by_rank = best_of_n_rank_weights(m - 1, n)
    wins = np.empty(m)
    for j in range(m):
        others = np.delete(np.arange(m), j)
        # np.unique's inverse gives the tie group of each completion in ascending order, and equal
        # rewards share the weight of the ranks that they take up.
        _, tie_group = np.unique(chooser[others], return_inverse=True)
        sizes = np.bincount(tie_group)
        ends = np.cumsum(sizes)
        cumulative = np.concatenate([[0.0], np.cumsum(by_rank)])
        weights = ((cumulative[ends] - cumulative[ends - sizes]) / sizes)[tie_group]
        difference = judge[others] - judge[j]
        wins[j] = np.sum(weights * ((difference > 0) + 0.5 * (difference == 0)))
    return float(wins.mean())


# --- KL -------------------------------------------------------------------------------------------


@torch.inference_mode()
def completion_kls(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    max_batch_tokens: int | None = None,
) -> list[tuple[float, ...]]:
    """Σ_t KL(π(· | x, y_<t) ‖ π0(· | x, y_<t)) along each of the policy's completions, in nats.

    The mean over completions drawn from the policy is an unbiased, Rao-Blackwellised estimate of
    KL(π ‖ π0): the exact KL over the vocabulary at every drawn prefix, a drawn end token's step
    included. It cannot be negative.
    """
    rows = [
        (index, k, group.prompt_token_ids, ids)
        for index, group in enumerate(groups)
        for k, ids in enumerate(group.token_ids)
    ]
    kls = [[0.0] * group.n for group in groups]
    lengths = [len(prompt) + len(ids) for _, _, prompt, ids in rows]
    # Both models' logits over the whole vocabulary are held at once.
    max_tokens = min(
        forward_batch_tokens(max_batch_tokens, policy.device),
        _LOGITS // policy.config.get_text_config().vocab_size,
    )
    for batch in token_batches(rows, lengths, max_tokens):
        chosen = [rows[index] for index in batch]
        for (index, k, _, _), kl in zip(
            chosen, _row_kls(policy, base, chosen, temperature), strict=True
        ):
            kls[index][k] = kl
    return [tuple(values) for values in kls]


def _row_kls(
    policy: PreTrainedModel, base: PreTrainedModel, rows: Sequence[Any], temperature: float
) -> list[float]:
    padded = pad_rows([row[2] for row in rows], [row[3] for row in rows], 0)
    width = padded.completion_mask.shape[1]
    log_probs = []
    for model in (policy, base):
        logits = last_logits(
            model,
            width + 1,
            input_ids=padded.input_ids.to(model.device),
            attention_mask=padded.attention_mask.to(model.device),
            position_ids=padded.position_ids.to(model.device),
            use_cache=False,
        )[:, :-1]
        log_probs.append((full_precision(logits) / temperature).log_softmax(dim=-1))
    ours, theirs = log_probs[0], log_probs[1].to(log_probs[0].device)
    # A token that the policy cannot draw adds nothing, whatever its log-ratio.
    terms = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0)
    steps = terms.sum(dim=-1).double().clamp(min=0).cpu()  # the last bits may fall below 0
    return [float(kl) for kl in (steps * padded.completion_mask).sum(dim=-1)]


# --- the evaluation of one model ------------------------------------------------------------------


@dataclass(frozen=True)
class ModelEvaluation:
    """What is known of one model; `None` where a figure has no meaning (the base's efficiency).

    `win_rate` is against the base model, `kl` is KL(model ‖ base) in nats, `length` and
    `length_change` (over the base model) count tokens, `tokens_per_answer` counts all tokens drawn
    for one answer, `win_rate_by` has the win rate by each further reward.
    """

    win_rate: Figure
    kl: Figure
    recovered: Figure
    kl_efficiency: Figure | None
    length: Figure
    length_change: Figure
    tokens_per_answer: Figure
    win_rate_by: Mapping[str, Figure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `evaluation.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the same prompts against the same base completions.

    Args:
        base: one scored group a prompt from the base model, of k + n completions: the first k are
            what models are compared with, all of them serve best-of-n's own win rate. Raises
            ValueError for fewer.
        n: of best-of-n.
        k: completions of each model a prompt.
        resamples: of the bootstrap.
    """

    base: Sequence[Group]
    n: int
    k: int
    resamples: int = 2000

    def __post_init__(self) -> None:
        _check_draws(self.base, self.k + self.n, "base")

    def best_of_n(self) -> ModelEvaluation:
        """Best-of-n itself; its KL is the closed form, which ties and repetitions only lower."""
        wins = self._best_of_n_wins()
        kl = BestOfN(self.n).kl()
        lengths = self._lengths(self.base)
        chosen = self._best_of_n_lengths()
        return ModelEvaluation(
            win_rate=self._mean(wins),
            kl=Figure.exact(kl),
            recovered=Figure.exact(1.0),
            kl_efficiency=self._figure(lambda win: kl_efficiency(win, kl), wins),
            length=self._mean(chosen),
            length_change=self._mean(chosen - lengths),
            tokens_per_answer=self._mean(self.n * lengths),
            win_rate_by={
                name: self._mean(self._best_of_n_wins(name)) for name in self._further_rewards()
            },
        )

    def base_model(self) -> ModelEvaluation:
        """The base model against itself."""
        half, nothing = Figure.exact(0.5), Figure.exact(0.0)
        lengths = self._mean(self._lengths(self.base))
        return ModelEvaluation(
            win_rate=half,
            kl=nothing,
            recovered=nothing,
            kl_efficiency=None,
            length=lengths,
            length_change=nothing,
            tokens_per_answer=lengths,
            win_rate_by=dict.fromkeys(self._further_rewards(), half),
        )

    def model(self, groups: Sequence[Group]) -> ModelEvaluation:
        """A trained model, from its scored groups with the metric `kl`.

        *recovered* = (win − ½)/(best-of-n's win − ½); *KL efficiency* = the least KL with which a
        rank-based tilt wins as often / the measured KL (0 when it wins half or less).
        Raises ValueError when the prompts are not the base groups' prompts, in their order.
        """
        _check_draws(groups, self.k, "model")
        if [group.prompt_id for group in groups] != [group.prompt_id for group in self.base]:
            raise ValueError("the model's groups and the base's are of different prompts")
        wins, kl = self._wins(groups), self._metric(groups, "kl")
        lengths = self._lengths(groups)
        best = self._best_of_n_wins()
        return ModelEvaluation(
            win_rate=self._mean(wins),
            kl=self._mean(kl),
            recovered=self._figure(_recovered, wins, best),
            kl_efficiency=self._figure(kl_efficiency, wins, kl),
            length=self._mean(lengths),
            length_change=self._mean(lengths - self._lengths(self.base)),
            tokens_per_answer=self._mean(lengths),
            win_rate_by={
                name: self._mean(self._wins(groups, name)) for name in self._further_rewards()
            },
        )

    def _further_rewards(self) -> list[str]:
        return [name for name in self.base[0].metrics if name != "kl"]

    def _wins(self, groups: Sequence[Group], reward: str | None = None) -> Floats:
        pairs = zip(groups, self.base, strict=True)
        return np.array(
            [
                win_rate(_rewards(ours, reward)[: self.k], _rewards(base, reward)[: self.k])
                for ours, base in pairs
            ]
        )

    def _best_of_n_wins(self, reward: str | None = None) -> Floats:
        return np.array(
            [
                best_of_n_win_rate(_rewards(group, None), _rewards(group, reward), self.n)
                for group in self.base
            ]
        )

    def _best_of_n_lengths(self) -> Floats:
        def expected(group: Group) -> float:
            rewards, lengths = _rewards(group, None), np.array(group.lengths(), np.float64)
            order = np.argsort(rewards, kind="stable")
            return float(best_of_n_rank_weights(group.n, self.n) @ lengths[order])

        return np.array([expected(group) for group in self.base])

    def _lengths(self, groups: Sequence[Group]) -> Floats:
        return np.array([np.mean(group.lengths()) for group in groups])

    def _metric(self, groups: Sequence[Group], name: str) -> Floats:
        return np.array([np.mean(group.metrics[name]) for group in groups])

    def _mean(self, per_prompt: Floats) -> Figure:
        return self._figure(lambda mean: mean, per_prompt)

    def _figure(self, statistic: Callable[..., ArrayLike], *per_prompt: Floats) -> Figure:
        return bootstrap(per_prompt, statistic, self.resamples)


def _check_draws(groups: Sequence[Group], wanted: int, whose: str) -> None:
    for group in groups:
        if group.n < wanted:
            raise ValueError(
                f"the {whose} group {group.prompt_id} has {group.n} completions, not {wanted}"
            )


def _rewards(group: Group, name: str | None) -> Floats:
    values = group.rewards if name is None else group.metrics[name]
    return np.asarray(values, dtype=np.float64)


def _recovered(win: ArrayLike, best: ArrayLike) -> Floats:
    gain = np.asarray(best) - 0.5
    # A reward that tells nothing apart gives best-of-n nothing to gain.
    return np.divide(np.asarray(win) - 0.5, gain, out=np.zeros_like(gain), where=gain > 0)


def kl_efficiency(win: ArrayLike, kl: ArrayLike) -> Floats:
    """The least KL for a win rate over the KL spent (nats), elementwise; 0 for half or less."""
    wins, kls = np.broadcast_arrays(np.asarray(win, np.float64), np.asarray(kl, np.float64))
    gains = (wins > 0.5) & (kls > 0)
    # At a win rate of 1 in a sample the least KL would be infinite; the sample cannot tell.
    least = optimal_kl(np.clip(wins, 0.5, 1 - 1e-6))
    return np.asarray(np.where(gains, least / np.where(kls > 0, kls, 1.0), 0.0))
