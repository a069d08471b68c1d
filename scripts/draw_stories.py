"""Draw the training stories of the demo's story model from stories260K.

Every story starts from the begin token alone. The first `--free-tokens` tokens are drawn at
temperature 1, so that the openings differ. The rest is drawn at `--temperature` 0.7, which gives
cleaner text than temperature 1. A shard depends only on its number, so the script can be stopped
and started again.

    python scripts/draw_stories.py --model MODEL_FOLDER --out build/stories
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
from pathlib import Path


def draw_shard(args: argparse.Namespace, shard: int) -> None:
    """Write `shard` as a Parquet file.

    Columns: `text`, `finished` (whether the end token was drawn), `tokens` (the number drawn).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

    from bonbon.models.growing_cache import block_growing_cache

    class TemperatureByPosition(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            free = input_ids.shape[1] <= args.free_tokens
            return scores if free else scores / args.temperature

    path = args.out / f"stories-{shard:05d}.parquet"
    if path.exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed * 100_003 + shard)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for start in range(0, args.stories_per_shard, args.batch):
        begin = torch.full((min(args.batch, args.stories_per_shard - start), 1), end)
        drawn = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            max_new_tokens=args.tokens,
            logits_processor=[TemperatureByPosition()],
            past_key_values=block_growing_cache(model.config),
            eos_token_id=end,
            pad_token_id=pad,
        )[:, 1:]
        for ids in drawn.tolist():
            finished = end in ids
            kept = ids[: ids.index(end)] if finished else ids
            text = tokenizer.decode(kept)
            rows.append({"text": text, "finished": finished, "tokens": len(kept) + finished})
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    os.replace(temporary, path)
    print(f"{path.name}: {len(rows)} stories", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=110)
    parser.add_argument("--stories-per-shard", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--free-tokens", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with mp.get_context("spawn").Pool(args.workers) as pool:
        pool.starmap(draw_shard, [(args, shard) for shard in range(args.shards)], chunksize=1)


if __name__ == "__main__":
    main()
