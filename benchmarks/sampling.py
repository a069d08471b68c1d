"""Drawing n completions a prompt: `TransformersSampler` beside `model.generate`.

    python benchmarks/sampling.py --model MODEL --prompts PROMPTS.jsonl [--n 8] [--tokens 64]

Both draw the same number of completions of the same prompts from the same model, in batches of the
same number of rows; `generate` with `num_return_sequences=n` prefills every prompt n times and pads
in the order given. The sampler also returns the drawn tokens' log-probabilities; `generate` is
asked for none. Prints the median throughput of several runs and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bonbon.config import SamplingConfig
from bonbon.models import end_token_ids, load_policy
from bonbon.prompts import read_prompts
from bonbon.sampling import TransformersSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128, help="completions a batch")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_policy(args.model)
    rows = read_prompts(args.prompts, limit=args.count)
    longest = max(len(tokenizer(row.prompt)["input_ids"]) for row in rows)
    config = SamplingConfig(
        n=args.n,
        max_new_tokens=args.tokens,
        max_batch_tokens=args.rows * (longest + args.tokens),
    )
    sampler = TransformersSampler(model, tokenizer, config)
    encoded = sampler.encode(rows)
    tokenizer.padding_side = "left"
    ends = torch.tensor(end_token_ids(model, tokenizer), device=model.device)

    def ours() -> int:
        return sum(sum(group.lengths()) for group in sampler.sample(encoded))

    @torch.inference_mode()
    def theirs() -> int:
        drawn = 0
        for start in range(0, len(rows), args.rows // args.n):
            texts = [str(row.prompt) for row in rows[start : start + args.rows // args.n]]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            out = model.generate(
                **batch.to(model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=args.tokens,
                num_return_sequences=args.n,
            )
            completions = out[:, batch["input_ids"].shape[1] :]
            ended = (
                torch.isin(completions, ends).cumsum(dim=1) - torch.isin(completions, ends).int()
            )
            drawn += int((ended == 0).sum())  # up to the first end token, which counts
        return drawn

    def rate(draw: Callable[[], int]) -> float:
        began = time.perf_counter()
        return draw() / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {"TransformersSampler": [], "generate": []}
    for _ in range(args.runs):
        rates["TransformersSampler"].append(rate(ours))
        rates["generate"].append(rate(theirs))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:<20} {median:10,.0f} tokens/s")
    print(f"ratio                {medians['TransformersSampler'] / medians['generate']:10.2f}")


if __name__ == "__main__":
    main()
