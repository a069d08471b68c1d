"""Partial scores: estimates of how good an unfinished completion will be.

Stepwise strategies score completions while they are drawn, by `partial`:

- `reward`: the reward of the text so far. Reward models were trained on whole texts, so how well
  this works depends on the model.
- `{implicit: MODEL}`: the log-ratio of a policy tuned from the base model (by DPO or BoNBoN) to the
  base model, token by token. A policy tuned to π* ∝ π0 e^(r/β) has, up to a constant,
  β ln π*(y)/π0(y) = r(y) as its implicit reward (Rafailov et al. 2023, arXiv 2305.18290), and its
  tokens' log-ratios are its advantages (Rafailov et al. 2024, arXiv 2404.12358).

Both models read a partial completion again at each checkpoint. This is not counted as drawn tokens,
but each scoring counts as a reward call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from bonbon.config.settings import Settings
from bonbon.decoding.strategy import Floats, Source
from bonbon.groups.group import Group
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from bonbon.models.padding import PaddedRows
    from bonbon.rewards.reward import Reward

# Scores of a group's completions, (n,), in the reward's unit. The second argument tells which of
# them are whole.
Score = Callable[[Group, Sequence[bool]], Floats]
LogRatios = Callable[[Group], list[Floats]]


class ImplicitReward(Settings):
    """Settings for partial scores by a tuned policy in place of the reward."""

    implicit: str = Field(description="a model tuned from the base model: a folder or hub id")


Partial = Literal["reward"] | ImplicitReward


def by_reward(reward: Reward) -> Score:
    """Return a score that is the reward of every completion, partial or whole.

    It raises BonbonError for rewards that are not finite.
    """
    from bonbon.rewards.reward import score_groups

    def score(group: Group, whole: Sequence[bool]) -> Floats:
        return np.array(score_groups(reward, [group])[0], dtype=np.float64)

    return score


def weighted_implicit_reward(log_ratios: ArrayLike) -> float:
    """Return Σ_t w_t ln π*(y_t|x, y_<t)/π0(y_t|x, y_<t) with w_t = 1/t (nats); 0 without tokens.

    TreeBoN's score of partial completions (Qiu et al. 2024, arXiv 2410.16033, section 3), which
    writes w_k = 1/|y_:k|. Here |y_:k| counts the token itself; otherwise the first weight would be
    undefined.
    """
    ratios = np.asarray(log_ratios, dtype=np.float64)
    return float(ratios @ (1 / np.arange(1, len(ratios) + 1)))


# --- token log-ratios -----------------------------------------------------------------------------


def token_log_ratios(name: str, source: Source) -> LogRatios:
    """Return a function that gives ln π*(y_t|x, y_<t)/π0(y_t|x, y_<t) of each token (nats).

    π* is the tuned model `name`, π0 the model of `source`. Both are taken at the source's sampling
    temperature; top-k and top-p are ignored.

    Raises BonbonError when the tuned model cannot be loaded or has another vocabulary, and for a
    source without a model in this process.
    """
    from bonbon.decoding.source import LocalSource

    if not isinstance(source, LocalSource):
        raise BonbonError(
            f"an implicit reward ({name}) needs the base model's own log-probabilities, and so a "
            "model in this process; set partial to reward"
        )
    tuned, tokenizer = _load(name, str(source.model.device), source.model.dtype)
    _check_vocabulary(name, tuned, tokenizer, source)
    models, temperature = (tuned, source.model), source.config.temperature

    def log_ratios(group: Group) -> list[Floats]:
        ours, theirs = (_token_log_probs(model, group, temperature) for model in models)
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    return log_ratios


@lru_cache(maxsize=1)
def _load(name: str, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the tuned policy; cached, so that repeated calls of a strategy load it once."""
    from bonbon.models.loading import load_policy

    model, tokenizer = load_policy(name, device=device)
    return model.to(dtype=dtype), tokenizer


def _check_vocabulary(name: str, tuned: PreTrainedModel, tokenizer: Tokenizer, base: Any) -> None:
    def width(model: PreTrainedModel) -> int:
        return int(model.config.get_text_config().vocab_size)

    same = tokenizer.get_vocab() == base.tokenizer.get_vocab()
    if not same or width(tuned) < width(base.model):
        raise BonbonError(
            f"model {name} has another vocabulary than the base model, so it cannot score its "
            "tokens; name a model that was tuned from this base"
        )


def _token_log_probs(model: PreTrainedModel, group: Group, temperature: float) -> list[Floats]:
    """Return ln π of each completion's tokens given the prompt, one vector a completion."""
    from bonbon.models.loading import forward_batch_tokens
    from bonbon.models.padding import pad_rows, token_batches

    lengths = [len(group.prompt_token_ids) + count for count in group.lengths()]
    log_probs: list[Floats] = [np.empty(0)] * group.n
    for batch in token_batches(group.token_ids, lengths, forward_batch_tokens(None, model.device)):
        ids = [group.token_ids[index] for index in batch]
        rows = pad_rows([group.prompt_token_ids] * len(batch), ids, 0)
        for index, row in zip(batch, _forward(model, rows, temperature), strict=True):
            log_probs[index] = row[: len(group.token_ids[index])]
    return log_probs


def _forward(model: PreTrainedModel, rows: PaddedRows, temperature: float) -> Floats:
    """Return ln π of the rows' completions, (rows, longest completion); padding has values too."""
    import torch

    from bonbon.models.logprobs import last_log_probs

    inputs: dict[str, Any] = {  # The last column predicts nothing.
        "input_ids": rows.input_ids[:, :-1].to(model.device),
        "attention_mask": rows.attention_mask[:, :-1].to(model.device),
        "position_ids": rows.position_ids[:, :-1].to(model.device),
        "use_cache": False,
    }
    with torch.inference_mode():
        ids = rows.completion_ids.to(model.device)
        log_probs = last_log_probs(model, ids, temperature, lambda: inputs)
    return np.asarray(log_probs.double().cpu())
