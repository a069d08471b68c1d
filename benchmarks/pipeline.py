"""The cost of the pipeline itself: prompts → samples → groups → batches, without a model.

    python benchmarks/pipeline.py                    # 10,000, 100,000 and 1,000,000 groups of 2
    python benchmarks/pipeline.py --groups 125000 --n 8 --tokens 64    # a million completions

Every size runs in its own process. Measured are seconds and peak memory of each stage, with the
code of a real run; everything is written to disk and read back. The fake sampler returns
completions made beforehand, so only reading, tokenising, converting and writing are measured.
`train` selects the best and the worst of each group and makes the batches of an epoch. Memory is
that of the process (rss), and the part that is its own: the rest are pages of files, which the
system may drop at any time. The last column is the share of all this in a run whose model draws
`--model-tokens-per-second` and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.config.run import RunConfig
from bonbon.config.sampling import SamplingConfig
from bonbon.demo import REWARD_MODEL, STORY_MODEL
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow, iter_prompts
from bonbon.groups.shards import open_groups
from bonbon.objectives.selection import best_and_worst
from bonbon.runs.shard_work import ShardWork, work_through, write_prompts
from bonbon.runs.work import drawing, scoring
from bonbon.sampling.encoding import iter_encoded
from bonbon.sampling.from_config import named_tokenizer
from bonbon.training.batches import GroupBatches, GroupCollator, PartsDataset
from bonbon.training.dataset import select_groups

BATCH, BATCH_TOKENS = 64, 4096
SIZES = (10_000, 100_000, 1_000_000)
PROMPT = "Once upon a time, there was a little girl who had a red ball. One day, "


@dataclass(frozen=True)
class Measured:
    """A stage's seconds, and the memory of its process (MiB) over time."""

    stage: str
    seconds: float
    first: float
    last: float
    peak: float
    own: float


class FakeSampler:
    """A sampler that returns the same completions for every prompt."""

    def __init__(self, n: int, tokens: int) -> None:
        self.config = SamplingConfig(n=n, max_new_tokens=tokens)
        random = np.random.default_rng(0)
        lengths = random.integers(tokens // 2, tokens + 1, n)
        self._token_ids = tuple(tuple(random.integers(3, 500, k).tolist()) for k in lengths)
        self._texts = tuple("word " * (k // 2) for k in lengths)

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        raise NotImplementedError

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        n = self.config.n
        return [
            Group(
                prompt_id=prompt.prompt_id,
                prompt=prompt.prompt,
                prompt_token_ids=prompt.token_ids,
                completions=self._texts,
                token_ids=self._token_ids,
                logprobs=(-1.5,) * n,
                finish_reasons=("stop",) * n,
            )
            for prompt in prompts
        ]

    def described(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def fake_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    return np.arange(len(completions), dtype=np.float64)


def write_prompt_file(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = {"prompt_id": f"prompt-{index}", "prompt": f"{PROMPT}{index}"}
            file.write(json.dumps(row) + "\n")


@contextmanager
def watched(stage: str, measurements: list[Measured]) -> Iterator[None]:
    """Measure seconds, and memory ten times a second, while a stage runs."""
    sizes: list[float] = []
    own: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            sizes.append(held("VmRSS"))
            own.append(held("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    tenth = max(1, len(sizes) // 10)
    sizes, own = sizes or [held("VmRSS")], own or [held("RssAnon")]
    first, last = np.mean(sizes[:tenth]), np.mean(sizes[-tenth:])
    measurements.append(Measured(stage, seconds, float(first), float(last), max(sizes), max(own)))


def held(what: str) -> float:
    """Return the MiB that the process holds now: VmRSS (all) or RssAnon (its own)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def measure(groups: int, n: int, tokens: int, folder: Path) -> list[Measured]:
    """Measure all stages on `groups` prompts, in this process."""
    measurements: list[Measured] = []
    config = RunConfig.model_validate(
        {
            "model": {"name": str(STORY_MODEL)},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "reward": {"model": str(REWARD_MODEL)},
        }
    )
    write_prompt_file(config.prompts.path, groups)
    tokenizer, context = named_tokenizer(config.model, config.sampler)
    sampler = FakeSampler(n, tokens)
    with watched("prompts", measurements):
        rows = iter_prompts(config.prompts.path)
        encoded = iter_encoded(rows, tokenizer, max_tokens=context)
        write_prompts(encoded, folder / "prompts", config.sampling.shard_size)
    with watched("sample", measurements):
        work = ShardWork(folder / "prompts", folder / "samples", drawing(sampler), {})
        work_through(work, "sampling")
    with watched("score", measurements):
        work = ShardWork(folder / "samples", folder / "groups", scoring(fake_reward), {})
        work_through(work, "scoring")
    with watched("train", measurements):
        selection = select_groups(open_groups(folder / "groups"), best_and_worst, folder)
        assert selection is not None
        collator = GroupCollator(pad_id=0)
        groups_of = PartsDataset(selection)
        for parts in GroupBatches(selection.shapes, BATCH, BATCH_TOKENS, seed=0):
            collator([groups_of[part] for part in parts])
    return measurements


def show(groups: int, n: int, tokens: int, rate: float, stages: Sequence[Measured]) -> None:
    for it in stages:
        each = 1e6 * it.seconds / (groups * n)
        print(
            f"{groups:>9,} {it.stage:<8} {it.seconds:8.1f} {each:12.1f}"
            f" {it.first:10.0f} {it.last:8.0f} {it.peak:8.0f} {it.own:8.0f}"
        )
    own = sum(it.seconds for it in stages)
    model = 0.75 * groups * n * tokens / rate
    print(
        f"{groups:>9,} {'all':<8} {own:8.1f} {1e6 * own / (groups * n):12.1f}"
        f"   {own / (own + model):.1%} of a run at {rate:,.0f} tokens/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="*", default=SIZES)
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="of the longest completion")
    parser.add_argument("--model-tokens-per-second", type=float, default=20_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            measurements = measure(args.groups[0], args.n, args.tokens, Path(folder))
        print(json.dumps([asdict(it) for it in measurements]))
        return
    print(f"n = {args.n}, at most {args.tokens} tokens a completion; memory in MiB")
    print("   groups stage     seconds µs/completion  rss first     last     peak  own peak")
    for groups in args.groups:
        options = ["--groups", groups, "--n", args.n, "--tokens", args.tokens, "--child"]
        command = [sys.executable, __file__, *map(str, options)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        stages = [Measured(**it) for it in json.loads(done.stdout.splitlines()[-1])]
        show(groups, args.n, args.tokens, args.model_tokens_per_second, stages)


if __name__ == "__main__":
    main()
