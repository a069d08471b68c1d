"""Draw completions with a transformers model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.loading import context_length, devices_of
from bonbon.models.padding import token_batches
from bonbon.sampling.cost import Candidates, Cost, timed
from bonbon.sampling.encoding import prompts_for
from bonbon.sampling.generation_loop import Decoder, Row, Rows
from bonbon.system.errors import BonbonError


class TransformersSampler:
    """Samples with a transformers model: each prompt is prefilled once and its cache expanded to n.

    Args:
        model: a causal language model in evaluation mode.
        processing_class: its tokenizer.
        config: what to draw.
        stream: names the random stream; samplers of two models that are to be compared need
            different ones, or their draws would be correlated.
        stop: strings at whose first appearance a completion ends.

    Raises BonbonError for a model whose layers are on several devices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Tokenizer,
        config: SamplingConfig,
        stream: str = "",
        stop: tuple[str, ...] = (),
    ) -> None:
        if len(devices_of(model)) > 1:
            raise BonbonError(
                "sampler: transformers draws from a model on one device; to spread one over "
                "several, use sampler: vllm with tensor_parallel_size"
            )
        self.model = model
        self.tokenizer = processing_class
        self.config = config
        self.stream = stream
        self.stop = stop

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """See `Sampler.encode`."""
        return list(prompts_for(rows, self.tokenizer, context_length(self.model), self.config))

    def described(self) -> dict[str, Any]:
        """See `Sampler.described`."""
        return {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def close(self) -> None:
        """See `Sampler.close`; the model is its owner's."""

    def decoder(self, progress: Callable[[int], Any] | None = None) -> Decoder:
        """Return what `Rows` of this sampler are drawn by."""
        return Decoder(self.model, self.tokenizer, self.config, self.stream, self.stop, progress)

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """See `Sampler.sample`."""
        drawn = self.draw(prompts, [range(self.config.n)] * len(prompts), progress)
        return [candidates.group for candidates in drawn]

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        ks: Sequence[range],
        progress: Callable[[int], Any] | None = None,
    ) -> list[Candidates]:
        """Completions `ks[i]` of each prompt's sequence of draws, and what they cost.

        The seconds are each prompt's share of its batch.
        """
        decoder = self.decoder(progress)
        longest = self.config.max_new_tokens
        lengths = [
            len(numbers) * (len(prompt.token_ids) + longest)
            for prompt, numbers in zip(prompts, ks, strict=True)
        ]
        drawn: dict[int, Candidates] = {}
        for batch in token_batches(prompts, lengths, self.config.max_batch_tokens):
            chosen = [(prompts[index], ks[index]) for index in batch]
            groups, seconds = timed(self._draw_batch, decoder, chosen)
            for index, (group, prefilled) in zip(batch, groups, strict=True):
                tokens = sum(group.lengths())
                cost = Cost(tokens, prefilled, seconds=seconds / len(batch))
                drawn[index] = Candidates(group, cost)
        return [drawn[index] for index in range(len(prompts))]

    def _draw_batch(
        self, decoder: Decoder, batch: Sequence[tuple[EncodedPrompt, range]]
    ) -> list[tuple[Group, int]]:
        """Groups, and the prompt tokens read for each.

        The prompts fit the token budget together, or are one that alone does not and is drawn in
        several passes.
        """
        if len(batch) > 1:
            passes = [[numbers for _, numbers in batch]]
        else:
            ((prompt, numbers),) = batch
            row_tokens = len(prompt.token_ids) + self.config.max_new_tokens
            at_once = max(1, self.config.max_batch_tokens // row_tokens)
            starts = range(0, len(numbers), at_once)
            passes = [[numbers[start : start + at_once]] for start in starts]
        prompts = [prompt for prompt, _ in batch]
        drawn: list[list[Row]] = [[] for _ in prompts]
        prefilled = [0] * len(prompts)
        for numbers_of in passes:
            rows = Rows(decoder, prompts, numbers_of)
            rows.draw(self.config.max_new_tokens)
            for index, (new, read) in enumerate(zip(rows.rows(), rows.prefilled_of(), strict=True)):
                drawn[index].extend(new)
                prefilled[index] += read
        groups = [decoder.group(*pair) for pair in zip(prompts, drawn, strict=True)]
        return list(zip(groups, prefilled, strict=True))
