"""A reward model: a sequence-classification model with one output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.groups.group import Prompt, as_text
from bonbon.models.fast_linear import fast_linear
from bonbon.models.forward import forward_parameters
from bonbon.models.loading import (
    apply_chat_template,
    forward_batch_tokens,
    load_pretrained,
    pick_device,
    pick_dtype,
)
from bonbon.models.padding import kept_when_cut, token_batches
from bonbon.rewards.shared_prefix import (
    reads_beginnings_once,
    scores_by_beginnings,
    shared_beginnings,
)
from bonbon.system.errors import BonbonError


def reward_inputs(
    tokenizer: Tokenizer, prompt: Prompt, completion: str, positions: int | None, types: bool
) -> dict[str, list[int]]:
    """Encode one completion for a reward model, as `RewardModel` describes it.

    Returns `input_ids` and, with `types` and where the tokenizer returns them, `token_type_ids`; at
    most as many tokens as the tokenizer allows and, unless it is None, `positions`.
    """
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": completion}]
        encoded = apply_chat_template(tokenizer, messages)
    else:
        encoded = tokenizer(as_text(prompt), completion)
    longest = tokenizer.model_max_length  # a huge number where the tokenizer has no limit
    if positions is not None:
        longest = min(longest, positions)
    names = ["input_ids"]
    if types and "token_type_ids" in encoded:
        names.append("token_type_ids")
    columns = kept_when_cut(encoded["input_ids"], longest, tokenizer.all_special_ids)
    return {name: [encoded[name][column] for column in columns] for name in names}


class RewardModel:
    """A Hugging Face sequence-classification model with a single output as a reward.

    If its tokenizer has a chat template, the conversation with the completion as its last message
    is scored; otherwise the pair (prompt, completion) as the tokenizer encodes pairs. In a pair, a
    conversation of one message is that message's text, and a longer one has a line
    `role: content` for each message. A text that is too long for the model loses its first tokens,
    except a leading special token.

    A causal model reads the common beginning of a prompt's rows once (`rewards.shared_prefix`).
    Batches are sorted by length and have at most `max_batch_tokens` tokens with padding (None:
    1,024 on a CPU, 16,384 elsewhere).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        max_batch_tokens: int | None = None,
    ) -> None:
        if model.config.num_labels != 1:
            raise BonbonError(
                f"the reward model has {model.config.num_labels} outputs; a reward model has one"
            )
        self.model = model
        self.tokenizer = processing_class
        self.max_batch_tokens = max_batch_tokens
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The model needs the padding token to locate the last token of a row.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Load from a folder or a hub id, safetensors only. Raises BonbonError when it fails."""
        where = pick_device(device)
        shared = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = load_pretrained(
            AutoModelForSequenceClassification,
            "reward model",
            name,
            dtype=pick_dtype(dtype, where),
            use_safetensors=True,
            **shared,
        )
        tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name, **shared)
        return cls(model.to(where).eval(), tokenizer, max_batch_tokens)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        rows = [self._inputs(p, c) for p, c in zip(prompts, completions, strict=True)]
        rewards = np.empty(len(rows))
        max_tokens = forward_batch_tokens(self.max_batch_tokens, self.model.device)
        with fast_linear(self.model):
            scored = self._shared(prompts, rows, max_tokens)
            rewards[list(scored)] = list(scored.values())
            alone = [index for index in range(len(rows)) if index not in scored]
            lengths = [len(rows[index]["input_ids"]) for index in alone]
            for batch in token_batches(alone, lengths, max_tokens):
                chosen = [alone[place] for place in batch]
                rewards[chosen] = self._score([rows[index] for index in chosen])
        return rewards

    def _shared(
        self, prompts: Sequence[Prompt], rows: list[dict[str, list[int]]], max_tokens: int
    ) -> dict[int, float]:
        """Score the rows whose common beginning is read once; returns scores by row index."""
        if not reads_beginnings_once(self.model) or any("token_type_ids" in row for row in rows):
            return {}
        pad_id = self.model.config.get_text_config().pad_token_id
        ids = [row["input_ids"] for row in rows]
        beginnings = shared_beginnings(prompts, ids, pad_id)
        return scores_by_beginnings(self.model, ids, beginnings, pad_id, max_tokens)

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """Return the token ids that the model reads for one completion."""
        return self._inputs(prompt, completion)["input_ids"]

    def _inputs(self, prompt: Prompt, completion: str) -> dict[str, list[int]]:
        """Encode one completion: its tokens and, if the model takes them, token types."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        types = "token_type_ids" in forward_parameters(self.model)
        return reward_inputs(self.tokenizer, prompt, completion, positions, types)

    @torch.inference_mode()
    def _score(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        padded = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        logits = self.model(**padded.to(self.model.device)).logits
        return np.asarray(logits.squeeze(-1).double().cpu())
