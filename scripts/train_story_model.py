"""Train the demo's story model from scratch on drawn stories (see `draw_stories.py`).

Learns a byte-level BPE, then a Llama-style model of 1.9 M parameters. Half of the rows start at a
sentence inside a story, so that the model can continue any opening, not only "Once upon a time".
A story that the source model did not finish gets no end token. Deterministic for a seed and a
number of threads.

    python scripts/train_story_model.py --stories build/stories --source MODEL_FOLDER \\
        --out src/bonbon/demo/story-model
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bonbon.models.loading import load_policy
from bonbon.models.padding import pad

COMMON = 20
BEGIN, END, PAD = "<s>", "</s>", "<pad>"
Story = tuple[str, bool]
Rows = list[list[int]]

CARD = """---
license: mit
pipeline_tag: text-generation
tags: [demo]
---
# BoNBoN's story model

A Llama-style model of {parameters:,} parameters with a byte-level BPE of {vocabulary:,} tokens. It
goes on with short children's stories and is the base model of `bonbon demo`; it is good for nothing
else.

- Data: {stories:,} stories ({drawn:,} tokens) drawn from the TinyStories model `stories260K` (260 K
  parameters, MIT by its upstream's statement), the first 8 tokens at temperature 1 and the rest at
  0.7. No story was written or chosen by hand.
- Training: {steps:,} steps of {batch} stories, none seen twice, {tokens:,} tokens of its own
  tokenizer in all; AdamW, learning rate {lr:g}, {minutes:.0f} minutes on 2 CPU cores.
- Loss: {held_loss:.3f} nats a token on {held:,} stories held out ({bits:.3f} bits a byte).
- Sharpened: after training, the last norm's weights were multiplied by {sharpen:g}, so that
  temperature 1 is what temperature {cooled:.2f} was; the loss is then {sharp_loss:.3f} nats.
- Clean text: of the words that it writes at temperature 1, {unknown:.2%} are ones that fewer than
  {common} of the drawn stories have (its source at temperature 1: {source_unknown:.2%}).
- Limits: a tiny vocabulary of things and names, no sense of a plot, and whatever biases the source
  model has.

Made by `scripts/draw_stories.py` and `scripts/train_story_model.py`.

Samples at temperature 1, not selected:

{samples}
"""


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that starts every text with <s>; a pair of texts is concatenated."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD
    )


def read_stories(folder: Path) -> tuple[list[Story], int]:
    """Read all stories, whether each was finished, and the total number of tokens drawn."""
    stories: list[Story] = []
    drawn = 0
    for path in sorted(folder.glob("stories-*.parquet")):
        table = pq.read_table(path).to_pydict()
        stories.extend(zip(table["text"], table["finished"], strict=True))
        drawn += sum(table["tokens"])
    return stories, drawn


def from_a_sentence(text: str, generator: np.random.Generator) -> str:
    """Return the story from a random sentence on, which starts in its first two thirds."""
    starts = [match.end() for match in re.finditer(r'[.!?]"?\s+', text[: len(text) * 2 // 3])]
    return text[generator.choice(starts) :] if starts else text


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[Story], context: int) -> Rows:
    encoded = tokenizer([text for text, _ in stories])["input_ids"]
    return [
        (ids + [tokenizer.eos_token_id] * finished)[:context]
        for ids, (_, finished) in zip(encoded, stories, strict=True)
    ]


def batches(
    stories: list[Story],
    tokenizer: PreTrainedTokenizerFast,
    batch: int,
    context: int,
    generator: np.random.Generator,
) -> Iterator[Rows]:
    """Yield one pass in random order; rows are sorted by length within 64 batches."""
    order = generator.permutation(len(stories))
    for start in range(0, len(order), batch * 64):
        block = [stories[i] for i in order[start : start + batch * 64]]
        cut = generator.random(len(block)) < 0.5
        block = [
            (from_a_sentence(text, generator) if inside else text, finished)
            for (text, finished), inside in zip(block, cut, strict=True)
        ]
        rows = sorted(encode(tokenizer, block, context), key=len)
        for index in generator.permutation(math.ceil(len(rows) / batch)):
            yield rows[index * batch : (index + 1) * batch]


def loss_of(model: LlamaForCausalLM, rows: Rows) -> torch.Tensor:
    """Compute the mean loss a token. The causal mask hides padding, which is on the right."""
    ids, mask = pad(rows, model.config.pad_token_id, "right")
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def build_model(tokenizer: PreTrainedTokenizerFast, context: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def build_optimizer(
    model: LlamaForCausalLM, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make AdamW without decay on the norms; linear warm-up, then a cosine to 2%."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = min(100, steps // 10 + 1)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
        return min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, rows: Rows) -> tuple[float, int]:
    """Compute nats a token over all rows, and the number of tokens predicted."""
    total, count = 0.0, 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        predicted = sum(len(row) - 1 for row in chunk)
        total += float(loss_of(model, chunk)) * predicted
        count += predicted
    return total / count, count


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def common_words(texts: list[str]) -> set[str]:
    """Return the words in at least `COMMON` texts; the others are mostly misspelt."""
    counts = Counter(word for text in texts for word in set(words(text)))
    return {word for word, count in counts.items() if count >= COMMON}


@torch.inference_mode()
def unknown_share(model: PreTrainedModel, tokenizer: Any, known: set[str]) -> float:
    """Measure the share of words outside `known` in stories drawn at temperature 1."""
    begin = torch.full((512, 1), tokenizer.bos_token_id)
    drawn = model.generate(begin, do_sample=True, top_k=0, max_new_tokens=100)
    # The last word may be cut off.
    written = [words(text)[:-1] for text in tokenizer.batch_decode(drawn, skip_special_tokens=True)]
    every = [word for text in written for word in text]
    return sum(word not in known for word in every) / len(every)


@torch.no_grad()
def sharpen(model: LlamaForCausalLM, factor: float) -> None:
    """Multiply all logits by `factor`: temperature 1 becomes the old temperature 1/factor."""
    model.model.norm.weight.mul_(factor)


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> str:
    begin = torch.full((count, 1), tokenizer.bos_token_id)
    drawn = model.generate(begin, do_sample=True, top_k=0, max_new_tokens=96)
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return "\n".join("> " + " ".join(text.split()) + "\n" for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", required=True, help="the model that drew the stories")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--sharpen", type=float, default=1.25)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = np.random.default_rng(args.seed)

    stories, drawn = read_stories(args.stories)
    tokenizer = train_tokenizer([text for text, _ in stories[:30_000]], args.vocabulary)
    model = build_model(tokenizer, args.context)
    print(f"{len(stories)} stories, {model.num_parameters():,} parameters", flush=True)
    held, training = stories[: args.held_out], stories[args.held_out :]
    steps = min(args.steps, math.ceil(len(training) / args.batch))
    optimizer, scheduler = build_optimizer(model, args.lr, steps)
    began, tokens = time.monotonic(), 0
    rounds = batches(training, tokenizer, args.batch, args.context, generator)
    for step, rows in zip(range(1, steps + 1), rounds, strict=False):
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens += sum(map(len, rows))
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - began)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tok/s", flush=True)
    model.eval()
    held_rows = encode(tokenizer, held, args.context)
    held_loss, predicted = held_out_loss(model, held_rows)
    held_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in held_rows)
    print(f"held-out loss {held_loss:.4f} nats a token")
    minutes = (time.monotonic() - began) / 60
    sharpen(model, args.sharpen)
    known = common_words([text for text, _ in stories])
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        stories=len(stories),
        drawn=drawn,
        steps=steps,
        tokens=tokens,
        lr=args.lr,
        batch=args.batch,
        minutes=minutes,
        held=len(held),
        held_loss=held_loss,
        bits=held_loss * predicted / held_bytes / math.log(2),
        sharpen=args.sharpen,
        cooled=1 / args.sharpen,
        sharp_loss=held_out_loss(model, held_rows)[0],
        unknown=unknown_share(model, tokenizer, known),
        common=COMMON,
        source_unknown=unknown_share(*load_policy(args.source), known),
        samples=samples(model, tokenizer, 6),
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
