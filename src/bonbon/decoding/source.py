"""A model in this process as a source of candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.strategy import Floats
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.forward import full_precision
from bonbon.models.loading import forward_batch_tokens
from bonbon.models.padding import PaddedRows, pad_rows, token_batches
from bonbon.sampling.cost import Candidates
from bonbon.sampling.generation_loop import Rows
from bonbon.sampling.transformers import TransformersSampler


class LocalSource:
    """A `StepwiseSource` that draws with a transformers model.

    Args:
        model: a causal language model in evaluation mode.
        processing_class: its tokenizer.
        config: how to draw; a strategy may draw `config.n` candidates.
        stop: strings that end a completion where they first appear.
        progress: called with the number of tokens of each step; an exception of it stops drawing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        config: SamplingConfig,
        stop: tuple[str, ...] = (),
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = processing_class
        self.config = config
        self.progress = progress
        self._sampler = TransformersSampler(model, processing_class, config, stop=stop)

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """See `TransformersSampler.encode`."""
        return self._sampler.encode(rows)

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        """See `Source.draw`."""
        return self._sampler.draw(prompts, ks, self.progress)

    def start(self, prompt: EncodedPrompt, n: int) -> Rows:
        """See `StepwiseSource.start`."""
        return Rows(self._sampler.decoder(self.progress), [prompt], [range(n)])

    def embed(self, group: Group) -> Floats:
        """Return the model's last hidden states, averaged over each completion's tokens.

        Shape (n, hidden width). A completion without tokens has a vector of zeros.
        """
        rows = [ids or group.prompt_token_ids[-1:] for ids in group.token_ids]
        lengths = [len(group.prompt_token_ids) + len(ids) for ids in rows]
        budget = forward_batch_tokens(None, self.model.device)
        embedded = np.zeros((group.n, self.model.config.get_text_config().hidden_size))
        for batch in token_batches(rows, lengths, budget):
            prompts = [group.prompt_token_ids] * len(batch)
            pad_id = self.tokenizer.pad_token_id or 0
            padded = pad_rows(prompts, [rows[index] for index in batch], pad_id)
            embedded[batch] = self._pooled(padded)
        embedded[[not ids for ids in group.token_ids]] = 0.0
        return embedded

    @torch.inference_mode()
    def _pooled(self, rows: PaddedRows) -> Floats:
        device = self.model.device
        hidden = self.model(
            input_ids=rows.input_ids.to(device),
            attention_mask=rows.attention_mask.to(device),
            position_ids=rows.position_ids.to(device),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states[-1]
        mask = rows.completion_mask.to(device)[..., None]
        states = full_precision(hidden[:, -mask.shape[1] :]).double() * mask
        return np.asarray((states.sum(dim=1) / mask.sum(dim=1)).cpu())
