"""Completions while they are drawn: one row each, a token at a time, over one key-value cache.

The core of the local sampler and of every decoding strategy that drops or branches rows. Each row
has its own random stream (`random_streams`): its t-th token is the inverse CDF of the next-token
distribution at the stream's t-th uniform number, so no draw depends on what else is in the batch.
Only rounding does: matrix products of different batch shapes may differ in the last bits, so a
token whose CDF boundary is that close to its uniform number (about one in a million in float32) may
differ; in float64 none does. Models whose rotary embedding depends on the longest row of a batch
(longrope and dynamic, such as Phi-3's 128k) are the exception: beyond their original context, draws
of a batch depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.models.fast_linear import fast_linear
from bonbon.models.forward import cache_parameter, forward_parameters, last_logits
from bonbon.models.growing_cache import block_growing_cache
from bonbon.models.loading import end_token_ids
from bonbon.models.padding import pad, positions
from bonbon.models.shared_prompts import SharedPrompts, shared_prompt_attention, shares_prompts
from bonbon.sampling.completion_text import CONTEXT_TOKENS, completion_text, cut_at_stop
from bonbon.sampling.distribution import draw_tokens, warped_log_probs
from bonbon.sampling.random_streams import uniform_stream
from bonbon.system.errors import BonbonError

# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The tokens of a completion that are drawn so far; `logprob` is summed over them (nats)."""

    token_ids: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class Decoder:
    """A model in evaluation mode, its tokenizer, and the settings to draw with.

    `stream` names the random streams. A row also ends when one of the `stop` strings appears in its
    text; the text then ends before that string.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    config: SamplingConfig
    stream: str = ""
    stop: tuple[str, ...] = ()
    progress: Callable[[int], Any] | None = None  # called with the number of tokens of each step

    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end a completion."""
        return end_token_ids(self.model, self.tokenizer)

    def group(self, prompt: EncodedPrompt, rows: Sequence[Row]) -> Group:
        """Convert rows of a prompt to a group; unfinished rows count as cut off."""
        ends = set(self.ends())
        texts, reasons = [], []
        for row in rows:
            text = completion_text(self.tokenizer, prompt.token_ids, row.token_ids)
            before_stop = cut_at_stop(text, self.stop)
            ended = before_stop is not None or (row.token_ids and row.token_ids[-1] in ends)
            texts.append(text if before_stop is None else before_stop)
            reasons.append("stop" if ended else "length")
        return Group(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(texts),
            token_ids=tuple(row.token_ids for row in rows),
            logprobs=tuple(row.logprob for row in rows),
            finish_reasons=tuple(reasons),
        )


class Rows:
    """Completions of some prompts while they are drawn; rows are ordered by prompt.

    Args:
        decoder: the model and the settings.
        prompts: each is read once; its rows share its cache or get copies of it.
        ks: `ks[i]` are the numbers of the i-th prompt's completions to draw, one row each.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[EncodedPrompt], ks: Sequence[Sequence[int]]
    ) -> None:
        self.decoder = decoder
        self.prompts = list(prompts)
        self.generated = 0
        self._counts = [len(numbers) for numbers in ks]
        self._ends = torch.tensor(decoder.ends(), device=decoder.model.device)
        self._prompt_of = [i for i, numbers in enumerate(ks) for _ in numbers]
        self._next_k = [max(numbers, default=-1) + 1 for numbers in ks]
        self._uniforms = torch.from_numpy(
            np.stack([self._stream(i, k) for i, numbers in enumerate(ks) for k in numbers])
        ).to(decoder.model.device)
        self._tokens = torch.full(self._uniforms.shape, -1, device=self._uniforms.device)
        self._logprobs = torch.zeros(self.n, dtype=torch.float64, device=self._uniforms.device)
        self._finished = torch.zeros(self.n, dtype=torch.bool, device=self._uniforms.device)
        self._step = 0  # tokens that every unfinished row has
        self._row_of = torch.arange(self.n, device=self._uniforms.device)  # of each cache line
        self._pending: torch.Tensor | None = None  # drawn, but not yet read by the model
        self._shared: SharedPrompts | None = None  # then the cache holds what was drawn alone
        self._prefill()

    def _stream(self, prompt: int, k: int) -> np.ndarray:
        config, name = self.decoder.config, self.prompts[prompt].prompt_id
        return uniform_stream(config.seed, self.decoder.stream, name, k, config.max_new_tokens)

    @torch.inference_mode()
    def _prefill(self) -> None:
        model, tokenizer = self.decoder.model, self.decoder.tokenizer
        self._cache = block_growing_cache(model.config)
        # The states of linear attention cannot be copied or dropped by row; with such layers the
        # prompt is read for each row, and finished rows stay in the batch.
        self._by_row = all(
            hasattr(layer, "batch_repeat_interleave") for layer in self._cache.layers
        )
        rows = torch.tensor(self._prompt_of)
        read = self.prompts if self._by_row else [self.prompts[i] for i in self._prompt_of]
        padded = pad([p.token_ids for p in read], tokenizer.pad_token_id or 0, "left")
        ids, mask = (x.to(model.device) for x in padded)
        with fast_linear(model):
            logits = self._forward(ids, positions(mask), attention_mask=mask)
        if self._by_row:
            lines = rows.to(model.device)
            logits = logits[lines]
            mask = self._expanded(mask, lines)
        self._logits, self._mask, self._position = logits, mask, mask.sum(dim=-1)

    def _expanded(self, mask: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """Copy or share the prompts' cache for these lines; returns their mask (lines, columns)."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        if shares_prompts(self.decoder.model, self._cache, lengths, self._counts):
            self._shared = SharedPrompts.of(self._cache, mask, lines)
            self._cache = block_growing_cache(self.decoder.model.config)
        else:
            self._cache.batch_select_indices(lines)
        return mask[lines]

    def _forward(self, ids: torch.Tensor, position: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Compute each line's next-token logits, (lines, vocabulary), and add to the cache."""
        model = self.decoder.model
        inputs |= {"input_ids": ids, "use_cache": True}
        inputs[cache_parameter(model) or "past_key_values"] = self._cache
        if "position_ids" in forward_parameters(model):
            inputs["position_ids"] = position
        return last_logits(model, 1, **inputs)[:, -1]

    # --- state ------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self._prompt_of)

    def prefilled_of(self) -> list[int]:
        """Return the prompt tokens that were read for each prompt: once, or once for each row."""
        rows = [1] * len(self.prompts) if self._by_row else self._counts
        return [
            len(prompt.token_ids) * count for prompt, count in zip(self.prompts, rows, strict=True)
        ]

    @property
    def prefilled(self) -> int:
        """The number of prompt tokens that were read."""
        return sum(self.prefilled_of())

    @property
    def finished(self) -> list[bool]:
        """Return whether each row has ended: at an end token, a stop string or the full length."""
        return list(self._finished.tolist())

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return list((self._tokens >= 0).sum(dim=-1).tolist())

    def cache_tokens(self) -> int:
        """Return the key-value entries that are in use now: cache lines × columns.

        Lines that share their prompt use fewer. Each line also has a few spare columns
        (`bonbon.models.growing_cache`).
        """
        return len(self._row_of) * self._mask.shape[1] if len(self._row_of) else 0

    def rows(self) -> list[list[Row]]:
        """Return the rows as they are now, by prompt."""
        by_prompt: list[list[Row]] = [[] for _ in self.prompts]
        drawn = zip(self._prompt_of, self._tokens.tolist(), self._logprobs.tolist(), strict=True)
        for prompt, tokens, logprob in drawn:
            ids = tuple(token for token in tokens if token >= 0)
            by_prompt[prompt].append(Row(ids, logprob))
        return by_prompt

    def group(self) -> Group:
        """Return all rows of the only prompt as a group; unfinished ones count as cut off."""
        (prompt,), (rows,) = self.prompts, self.rows()
        return self.decoder.group(prompt, rows)

    # --- drawing, dropping and branching ----------------------------------------------------------

    @torch.inference_mode()
    def draw(self, tokens: int) -> int:
        """Draw up to `tokens` further tokens in every unfinished row; returns how many in all."""
        before = self.generated
        last = min(self._step + tokens, self.decoder.config.max_new_tokens)
        with fast_linear(self.decoder.model):
            while self._step < last and len(self._row_of):
                self._draw_one()
        return self.generated - before

    def _draw_one(self) -> None:
        if self._pending is not None:
            self._read(self._pending)
        config, rows = self.decoder.config, self._row_of
        log_probs = warped_log_probs(self._logits, config)
        token = draw_tokens(log_probs, self._uniforms[rows, self._step])
        picked = log_probs.gather(-1, token[:, None]).squeeze(-1).double()
        going = ~self._finished[rows]
        self._tokens[rows, self._step] = torch.where(going, token, -1)
        self._logprobs[rows] += torch.where(going, picked, 0.0)
        count = int(going.sum())
        self.generated += count
        self._step += 1
        self._pending = token
        self._finish(going, token)
        if self.decoder.progress is not None:
            self.decoder.progress(count)

    def _read(self, token: torch.Tensor) -> None:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
        ids, position = token[:, None], self._position[:, None]
        if self._shared is None:
            self._logits = self._forward(ids, position, attention_mask=self._mask)
        else:
            with shared_prompt_attention(self.decoder.model):
                self._logits = self._forward(ids, position, shared_prompts=self._shared)
        self._position = self._position + 1

    def _finish(self, going: torch.Tensor, token: torch.Tensor) -> None:
        """Mark the rows that have ended, and free their lines once enough of them have."""
        rows = self._row_of
        if self._step == self.decoder.config.max_new_tokens:
            self._finished[rows] = True
        else:
            self._finished[rows] |= torch.isin(token, self._ends)
            if self.decoder.stop:
                self._finish_at_stop(rows[going].tolist())
        alive = ~self._finished[rows]
        count = int(alive.sum())
        # Dropping lines copies the cache, so it waits until an eighth can go.
        if count == 0 or (self._by_row and count <= len(rows) * 7 / 8):
            self._keep_lines(alive.nonzero().squeeze(-1))

    def _finish_at_stop(self, rows: Sequence[int]) -> None:
        tail = CONTEXT_TOKENS + 4 * max(len(string) for string in self.decoder.stop)
        for row in rows:
            ids = self._tokens[row, : self._step].tolist()
            before = [*self.prompts[self._prompt_of[row]].token_ids, *ids[:-tail]]
            text = completion_text(self.decoder.tokenizer, before, ids[-tail:])
            if cut_at_stop(text, self.decoder.stop) is not None:
                self._finished[row] = True

    def _keep_lines(self, lines: torch.Tensor) -> None:
        """Keep these cache lines, some perhaps several times."""
        self._row_of = self._row_of[lines]
        if not len(lines):
            self._cache = DynamicCache(config=self.decoder.model.config)  # frees the old one
            self._shared = None
            return
        self._cache.batch_select_indices(lines)
        if self._shared is not None:
            self._shared = self._shared.keep(lines)
        self._mask, self._position = self._mask[lines], self._position[lines]
        self._logits = self._logits[lines]
        if self._pending is not None:
            self._pending = self._pending[lines]

    @torch.inference_mode()
    def free_finished(self) -> None:
        """Free the cache lines of finished rows now, not only once an eighth can go."""
        alive = ~self._finished[self._row_of]
        if self._by_row and not bool(alive.all()):
            self._keep_lines(alive.nonzero().squeeze(-1))

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Replace row i by the old row `rows[i]`; rows that are not in `rows` are dropped.

        A row that is in `rows` again is branched: the copy gets a random stream of its own. Dropped
        and finished rows hold no cache. Raises BonbonError for models whose state is not separate
        by row (linear attention).
        """
        if not self._by_row:
            kind = self.decoder.model.config.model_type
            raise BonbonError(
                f"rows of a {kind} model cannot be dropped or branched while they are drawn, since "
                "its layers keep more than keys and values; choose a strategy of whole draws, such "
                "as best_of_n"
            )
        index = torch.tensor(list(rows), dtype=torch.long, device=self._tokens.device)
        line_of = torch.full((self.n,), -1, device=index.device)
        line_of[self._row_of] = torch.arange(len(self._row_of), device=index.device)
        live = ((line_of[index] >= 0) & ~self._finished[index]).nonzero().squeeze(-1)
        self._keep_lines(line_of[index[live]])
        self._row_of = live
        self._tokens, self._uniforms = self._tokens[index], self._uniforms[index]
        self._logprobs, self._finished = self._logprobs[index], self._finished[index]
        self._prompt_of = [self._prompt_of[row] for row in rows]
        self._branch(rows)

    def _branch(self, rows: Sequence[int]) -> None:
        seen: set[int] = set()
        for new, old in enumerate(rows):
            if old in seen:
                prompt = self._prompt_of[new]
                stream = self._stream(prompt, self._next_k[prompt])
                self._uniforms[new] = torch.from_numpy(stream)
                self._next_k[prompt] += 1
            seen.add(old)
