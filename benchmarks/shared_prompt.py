"""A training step's forward and backward pass: the prompt computed once, beside padded rows.

    python benchmarks/shared_prompt.py --model MODEL

For several prompt lengths, best and worst completion of a batch of prompts go through the model as
one row a prompt (`shared_prompt_log_probs`) and as two (`completion_log_probs`). Prints the median
time of several runs of each and the ratio; above 1 sharing pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bonbon.batching import pad_rows
from bonbon.logprobs import completion_log_probs, shared_prompt_log_probs, shared_prompt_rows
from bonbon.models import load_policy


def seconds(step: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    step().sum().backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    model, _ = load_policy(args.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[list[int]]:
        size = (args.batch, length)
        return torch.randint(3, model.config.vocab_size, size, generator=generator).tolist()

    for length in args.prompt_tokens:
        prompts, best, worst = draw(length), draw(args.tokens), draw(args.tokens)
        shared = shared_prompt_rows(prompts, [best, worst], 0)
        rows = pad_rows(prompts * 2, best + worst, 0)

        def once(shared: object = shared) -> torch.Tensor:
            return shared_prompt_log_probs(model, shared, torch.float32)  # type: ignore[arg-type]

        def twice(rows: object = rows) -> torch.Tensor:
            return completion_log_probs(model, rows)  # type: ignore[arg-type]

        times = [(seconds(once), seconds(twice)) for _ in range(args.runs)]
        one, two = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"prompt {length:4d} tokens: shared {one * 1000:7.1f} ms, "
            f"two rows {two * 1000:7.1f} ms, ratio {two / one:.2f}"
        )


if __name__ == "__main__":
    main()
