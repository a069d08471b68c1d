"""Completions a second of `RewardModel`, compared with plain batches in order of arrival.

    python benchmarks/scoring.py [--quick] [--document docs/benchmarks-speed.md]

The plain way tokenises and pads the completions batch by batch in their order; it uses the best of
three batch sizes, chosen in a first run. `RewardModel` reads a prompt once for its n completions
and sorts by length. Prompts have a fixed length, completions from a quarter of the maximum to the
maximum. Both give the same scores (checked), take turns, and include tokenising.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForSequenceClassification

from bonbon.demo import REWARD_MODEL
from bonbon.rewards.model import RewardModel
from sampling import conditions, llama_config, word_tokenizer, write_section

GROUPS = {"demo": 64, "100m": 16}
PLAIN_ROWS = (8, 16, 32)
HEADER = (
    "| reward model | prompt:completion | n | RewardModel, completions/s | in order of arrival | "
    "ratio |\n" + "|---" * 6 + "|"
)

Scores = NDArray[np.float64]


def reward_model(name: str, args: argparse.Namespace) -> RewardModel:
    """Load the demo's reward model, or make a random Llama; one word of a text is one token."""
    if name == "demo":
        model = LlamaForSequenceClassification.from_pretrained(REWARD_MODEL, dtype="float32")
        model.config.max_position_embeddings = 2048  # rotary positions: longer texts work
    else:
        torch.manual_seed(0)
        config = llama_config(name)
        config.num_labels = 1
        model = LlamaForSequenceClassification(config)
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    return RewardModel(model, word_tokenizer(model.config.vocab_size))


@dataclass(frozen=True)
class Shape:
    """The groups to score: prompt tokens, most completion tokens, n, number of groups."""

    prompt: int
    completion: int
    n: int
    groups: int


def texts(shape: Shape, seed: int) -> tuple[list[str], list[str]]:
    """Make prompts, each n times, and completions, of random words."""
    generator = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(f"t{i}" for i in generator.integers(3, 2000, count))

    prompts = [text for _ in range(shape.groups) for text in [words(shape.prompt)] * shape.n]
    most = shape.completion
    lengths = generator.integers(most // 4, most + 1, len(prompts))
    return prompts, [" " + words(length) for length in lengths]


@torch.inference_mode()
def plain(reward: RewardModel, rows: int, prompts: list[str], completions: list[str]) -> Scores:
    scores = []
    for start in range(0, len(prompts), rows):
        chosen = slice(start, start + rows)
        batch = reward.tokenizer(
            prompts[chosen],
            completions[chosen],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        logits = reward.model(**batch.to(reward.model.device)).logits
        scores.append(logits.squeeze(-1).double().cpu().numpy())
    return np.concatenate(scores)


def timed(score: Callable[..., Scores], *given: Any) -> tuple[Scores, float]:
    began = time.perf_counter()
    return score(*given), time.perf_counter() - began


def rates(reward: RewardModel, shape: Shape, runs: int) -> tuple[float, float]:
    """Measure median completions a second: of `RewardModel`, and in order of arrival."""
    first = texts(shape, seed=0)
    expected = reward(*first)
    tried = {}
    for rows in PLAIN_ROWS:
        scores, tried[rows] = timed(plain, reward, rows, *first)
        exact = reward.model.dtype == torch.float32
        np.testing.assert_allclose(scores, expected, atol=1e-4 if exact else 0.5)
    best = min(tried, key=tried.__getitem__)
    ours, theirs = [], []
    for run in range(runs):
        given = texts(shape, seed=1 + run)
        ours.append(timed(reward, *given)[1])
        theirs.append(timed(plain, reward, best, *given)[1])
    count = len(first[0])
    return count / statistics.median(ours), count / statistics.median(theirs)


def lines(args: argparse.Namespace) -> Iterator[str]:
    yield from (conditions(args), "", HEADER)
    for name in args.models:
        reward = reward_model(name, args)
        for lengths in args.lengths:
            prompt, completion = map(int, lengths.split(":"))
            shape = Shape(prompt, completion, args.n, GROUPS[name])
            ours, theirs = rates(reward, shape, args.runs)
            ratio = ours / theirs
            yield f"| {name} | {lengths} | {args.n} | {ours:,.1f} | {theirs:,.1f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--lengths", nargs="+", default=["64:64", "256:64"])
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--document", type=Path, help="write the table there, between its markers")
    parser.add_argument("--quick", action="store_true", help="the demo's model alone, 64:64")
    args = parser.parse_args()
    if args.quick:
        args.models, args.lengths, args.runs = ["demo"], ["64:64"], 3
    torch.set_num_threads(args.threads)
    written: list[Any] = []
    for text in lines(args):
        print(text, flush=True)
        written.append(text)
    if args.document:
        write_section(args.document, "scoring.py", written)


if __name__ == "__main__":
    main()
