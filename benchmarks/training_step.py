"""Cost of a training step: `BoNBoNTrainer` and TRL's `DPOTrainer(loss_type=["ipo", "sft"])`.

    python benchmarks/training_step.py [--quick] [--model MODEL] [--output TABLE.md]

Every figure comes from its own process, with the same model, groups and tokens, in float32, with
AdamW, without gradient checkpointing and without padding (all prompts and all completions are
equally long, which is TRL's best case). From m completions TRL gets m/2 pairs; our objective is
`bonbon` for 2 completions and `bonbon_ranks` for more. TRL runs with its defaults, which load a
reference model, and once more with the reference's log-probabilities precomputed, which is not in
its time; ours are in the groups. Without `--model` the model is a random Llama.

Time is that of one optimiser step, divided by its groups, the median of the steps after the first:
processor time of one thread on a CPU, so that other processes do not count, and wall-clock time on
a GPU. Memory is the peak, and the part added after the policy was loaded: gradients, optimiser,
activations and TRL's reference model.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from bonbon.groups.group import Group

SIDES = {
    "bonbon": "BoNBoNTrainer",
    "bonbon_padded": "BoNBoNTrainer, share_prompt=False",
    "trl": "DPOTrainer",
    "trl_precomputed": "DPOTrainer, reference precomputed",
}
MIB = 2**20


# --- model and data -------------------------------------------------------------------------------


def save_random_llama(folder: Path, hidden: int, layers: int) -> None:
    """Save a Llama with random weights and 32,000 tokens, and a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        dtype="float32",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32_000)}, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(folder)


def random_groups(count: int, args: argparse.Namespace, vocabulary: int) -> list[Group]:
    generator = np.random.default_rng(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(3, vocabulary, length).tolist())

    return [
        Group(
            prompt_id=str(index),
            prompt="",
            prompt_token_ids=tokens(args.prompt),
            completions=("",) * args.completions,
            token_ids=tuple(tokens(args.completion) for _ in range(args.completions)),
            logprobs=(-10.0 * args.completion,) * args.completions,
            finish_reasons=("length",) * args.completions,
            rewards=tuple(generator.permutation(args.completions).astype(float).tolist()),
        )
        for index in range(count)
    ]


def pairs(groups: Sequence[Group]) -> Iterator[dict[str, list[int]]]:
    """Yield the groups' completions in pairs, as TRL's rows of token ids."""
    for group in groups:
        rewards = group.rewards or ()
        for k in range(0, group.n, 2):
            worse, better = sorted((k, k + 1), key=lambda index: rewards[index])
            yield {
                "prompt_ids": list(group.prompt_token_ids),
                "chosen_ids": list(group.token_ids[better]),
                "rejected_ids": list(group.token_ids[worse]),
            }


# --- one side, in a process of its own ------------------------------------------------------------


class StepTimes(TrainerCallback):
    """A callback that records the seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._began)


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def start_peak() -> int:
    """Reset the peak memory, and return the bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def settings(folder: str, batch: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-6,
        "max_grad_norm": 10.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def our_trainer(model: Any, groups: list[Group], folder: str, args: argparse.Namespace) -> Any:
    from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer

    objective = "bonbon" if args.completions == 2 else "bonbon_ranks"
    share_prompt = False if args.side == "bonbon_padded" else None
    config = BoNBoNConfig(
        objective=objective, share_prompt=share_prompt, **settings(folder, args.groups)
    )
    return BoNBoNTrainer(model, config, groups)


def trl_trainer(model: Any, groups: list[Group], folder: str, args: argparse.Namespace) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        """A `DPOTrainer` that takes rows of token ids; TRL's would tokenise text."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    config = DPOConfig(
        loss_type=["ipo", "sft"],
        precompute_ref_log_probs=args.side == "trl_precomputed",
        **settings(folder, args.groups * args.completions // 2),
    )
    return OfTokens(model=model, args=config, train_dataset=Dataset.from_list(list(pairs(groups))))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    make = trl_trainer if args.side.startswith("trl") else our_trainer
    if make is trl_trainer:
        import trl  # noqa: F401  (before memory is measured)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    for parameter in model.parameters():  # into memory, since the file is only mapped
        parameter.data = parameter.data.clone()
    if torch.cuda.is_available():
        model.cuda()
    vocabulary = model.config.get_text_config().vocab_size
    groups = random_groups(args.groups * (1 + args.steps), args, vocabulary)
    times = StepTimes()
    loaded = start_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, groups, folder, args)
        trainer.add_callback(times)
        trainer.train()
    seconds = statistics.median(times.seconds[1:]) / args.groups
    return {
        "seconds": seconds,
        "peak": peak(),
        "added": peak() - loaded,
        "parameters": model.num_parameters(),
    }


# --- the table ------------------------------------------------------------------------------------


def measure_elsewhere(side: str, prompt: int, completion: int, m: int, args: Any) -> dict[str, Any]:
    given = {
        "side": side,
        "prompt": prompt,
        "completion": completion,
        "completions": m,
        "groups": max(1, args.rows // m),
        "steps": args.steps,
        "model": args.model,
    }
    options = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(prompt: int, completion: int, m: int, args: argparse.Namespace) -> Iterator[str]:
    """Yield each side's row of the table, with its figures / ours."""
    ours: dict[str, Any] = {}
    for side, name in SIDES.items():
        figures = measure_elsewhere(side, prompt, completion, m, args)
        ours = ours or figures
        times, memory = (figures[key] / ours[key] for key in ("seconds", "added"))
        yield (
            f"| {prompt}:{completion} | {m} | {name} | {figures['seconds']:.3f} | {times:.2f} | "
            f"{figures['peak'] / MIB:,.0f} | {figures['added'] / MIB:,.0f} | {memory:.2f} |"
        )


def write_table(args: argparse.Namespace) -> None:
    config = LlamaConfig.from_pretrained(args.model)
    size = AutoModelForCausalLM.from_pretrained(args.model).num_parameters() / 1e6
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"
    lines = [
        f"`python {shlex.join(sys.argv)}` on {device}: {size:.1f} M parameters, vocabulary "
        f"{config.vocab_size:,}, {args.rows} completions a step (at least one group), median of "
        f"{args.steps} steps.",
        "",
        "| prompt:completion | completions | trainer | s a group | times ours | peak MiB | "
        "of these on top of the loaded policy | times ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for m in args.completion_counts:
        for lengths in args.lengths:
            prompt, completion = map(int, lengths.split(":"))
            for row in rows_of(prompt, completion, m, args):
                lines.append(row)
                print(row, flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder; default: a random Llama of 21 M")
    parser.add_argument("--lengths", nargs="+", default=["64:64", "256:64", "512:64"])
    parser.add_argument("--completion-counts", nargs="+", type=int, default=[2, 8])
    parser.add_argument(
        "--rows", type=int, default=8, help="completions a step, at least one group"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one more")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--quick", action="store_true", help="only 128:32 and a Llama of 4 M")
    one = parser.add_argument_group("one side of one row, as JSON")
    one.add_argument("--side", choices=SIDES)
    for name in ("prompt", "completion", "completions", "groups"):
        one.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    if args.quick:
        args.lengths, args.completion_counts, args.rows, args.steps = ["128:32"], [2], 2, 1
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            save_random_llama(Path(folder), *((64, 2) if args.quick else (256, 6)))
        write_table(args)


if __name__ == "__main__":
    main()
