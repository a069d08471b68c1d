"""Tokens per second of `TransformersSampler`, `model.generate` and vLLM, and their limits.

    python benchmarks/sampling.py [--quick] [--document docs/benchmarks-speed.md]
    python benchmarks/sampling.py --device cuda --dtype bfloat16 --models 100m 1b --rows 512

All draw n completions of the same prompts from the same random Llamas. Prompts are random; prompts
and completions have fixed lengths, since no token ends a completion. Each side uses the better of
two batch sizes, chosen in a first run; then the sides take turns, each turn with new prompts, and
the figures are medians. vLLM runs in its own environment (scripts/setup_vllm.sh), as a process that
waits while others run; it gets all prompts at once, shares prefixes and is compiled.

Our sampler also returns the tokens' log-probabilities and texts; the others do not.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 2048
BEGIN, END = "<!-- benchmarks/{name} writes from here -->", "<!-- {name}: to here -->"
# vLLM's attention on a CPU does not support stories260K's head size of 8; here heads are wider.
LLAMAS: dict[str, dict[str, Any]] = {
    "260k": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "demo": {
        "vocab_size": 2048,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "100m": {
        "vocab_size": 32_000,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
ROWS = {"260k": 256, "demo": 128, "100m": 32, "1b": 8}  # completions a run, on a CPU

Prompts = list[list[int]]


@dataclass(frozen=True)
class Cell:
    """The completions to draw: `rows` in all, n of each prompt."""

    prompt: int
    completion: int
    n: int
    rows: int

    def prompts(self, seed: int, vocabulary: int) -> Prompts:
        generator = np.random.default_rng(seed)
        return generator.integers(3, vocabulary, (self.rows // self.n, self.prompt)).tolist()


# --- models and machine ---------------------------------------------------------------------------


def llama_config(name: str) -> Any:
    from transformers import LlamaConfig

    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    tied = {"tie_word_embeddings": True, "max_position_embeddings": CONTEXT}
    return LlamaConfig(**(tied | ends | LLAMAS[name]))


def word_tokenizer(vocabulary: int) -> Any:
    """Make a tokenizer with one word for each token and no end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0")


def median_seconds(work: Callable[[], Any], runs: int = 5) -> float:
    import torch

    def once() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(runs))


def machine_peaks(device: str, dtype: Any) -> tuple[float, float]:
    """Measure FLOP/s of a large matrix product, with the faster of two libraries, and bytes/s."""
    import torch

    from bonbon.models.fast_linear import fast_linear

    size = 2048 if device == "cpu" else 8192
    layer = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    inputs = torch.randn(size, size, device=device, dtype=dtype)
    memory = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    with torch.inference_mode():
        usual = median_seconds(lambda: torch.mm(inputs, layer.weight))
        with fast_linear(layer):
            fast = median_seconds(lambda: layer(inputs))
        reading = median_seconds(memory.sum)
    print(f"matrix products: {2e-9 * size**3 / usual:,.0f} GFLOP/s by torch.mm", flush=True)
    return 2 * size**3 / min(usual, fast), memory.nbytes / reading


def costs(config: Any, cell: Cell, batch: int, width: int) -> tuple[float, float]:
    """Compute the least FLOPs and bytes moved for a token, drawn in batches of `batch` rows.

    FLOPs: two a weight and token, and the attention's products; prompt tokens are without the
    output head. Bytes: the weights once a step, a prompt's keys and values once for its n rows, and
    the row's own keys and values. `width` is the bytes of a number.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * hidden * keys // heads
    body = layers * (attention + 3 * hidden * config.intermediate_size)
    head = hidden * config.vocab_size
    own = cell.completion / 2  # a row's own columns that it reads, on average
    per_column = 4 * layers * hidden
    read_prompt = cell.prompt * (2 * body + per_column * cell.prompt / 2)
    drawn = 2 * (body + head) + per_column * (cell.prompt + own)
    flops = drawn + read_prompt / (cell.n * cell.completion)
    cached = 2 * layers * keys * (hidden // heads) * (cell.prompt / cell.n + own)
    return flops, width * ((body + head) / batch + cached)


# --- the samplers ---------------------------------------------------------------------------------


class Ours:
    """The sampler `TransformersSampler`; `batch` is its `max_batch_tokens`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def batches(self, cell: Cell) -> list[int]:
        from bonbon.config.sampling import SamplingConfig

        whole = cell.rows * (cell.prompt + cell.completion)
        default = SamplingConfig().max_batch_tokens
        return [whole] if whole <= default else [default, whole]

    def draw(self, cell: Cell, prompts: Prompts, batch: int) -> int:
        from bonbon.config.sampling import SamplingConfig
        from bonbon.groups.prompts import EncodedPrompt
        from bonbon.sampling.transformers import TransformersSampler

        config = SamplingConfig(n=cell.n, max_new_tokens=cell.completion, max_batch_tokens=batch)
        sampler = TransformersSampler(self.model, self.tokenizer, config)
        encoded = [EncodedPrompt(str(i), "", tuple(ids)) for i, ids in enumerate(prompts)]
        return sum(sum(group.lengths()) for group in sampler.sample(encoded))


class Generate:
    """The sampler `model.generate(num_return_sequences=n)`; `batch` is its rows at once."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def batches(self, cell: Cell) -> list[int]:
        return sorted({max(cell.n, cell.rows // 4), cell.rows})

    def draw(self, cell: Cell, prompts: Prompts, batch: int) -> int:
        import torch

        drawn, at_once = 0, batch // cell.n
        for start in range(0, len(prompts), at_once):
            ids = torch.tensor(prompts[start : start + at_once], device=self.model.device)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=cell.completion,
                num_return_sequences=cell.n,
            )
            drawn += out[:, ids.shape[1] :].cpu().numel()
        return drawn


class Vllm:
    """The sampler of vLLM, in its own process; it gets all prompts at once."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def batches(self, cell: Cell) -> list[int]:
        return [cell.rows]

    def draw(self, cell: Cell, prompts: Prompts, batch: int) -> int:
        assert self.process.stdin is not None
        asked = {"prompts": prompts, "n": cell.n, "tokens": cell.completion}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("drawn "):  # vLLM may print other lines
                return line.split()[1]
        raise SystemExit("vLLM ended; see its output above, or run with --vllm none")


@contextmanager
def vllm_side(folder: Path, args: argparse.Namespace) -> Iterator[Vllm | None]:
    """Start vLLM with the model in `folder`; None where it is not installed."""
    if not args.vllm.exists():
        yield None
        return
    settings = {
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else an engine would use the CPU while others run
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    options = ["--vllm-model", str(folder), "--dtype", args.dtype, *["--quick"] * args.quick]
    process = subprocess.Popen(
        [str(args.vllm), __file__, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    try:
        yield Vllm(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()


def serve_vllm(args: argparse.Namespace) -> None:
    """Run vLLM in the other process: reads a line of JSON, prints the number of tokens drawn."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=args.vllm_model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=CONTEXT,
        enforce_eager=args.quick,
        gpu_memory_utilization=0.4,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        settings = SamplingParams(
            n=asked["n"], max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        print("drawn", sum(len(c.token_ids) for out in outputs for c in out.outputs), flush=True)


# --- the table ------------------------------------------------------------------------------------


def seconds_of(side: Any, cell: Cell, batch: int, prompts: Prompts) -> float:
    began = time.perf_counter()
    drawn = side.draw(cell, prompts, batch)
    seconds = time.perf_counter() - began
    assert drawn == cell.rows * cell.completion, (drawn, cell)
    return seconds


def rates(
    sides: dict[str, Any], cell: Cell, runs: int, vocabulary: int
) -> tuple[dict[str, float], int]:
    """Measure each side's median tokens per second; also return our rows at once."""
    best, seconds = {}, dict[str, list[float]]()
    first = cell.prompts(0, vocabulary)
    for name, side in sides.items():
        tried = {batch: seconds_of(side, cell, batch, first) for batch in side.batches(cell)}
        best[name] = min(tried, key=tried.__getitem__)
    for run in range(runs):
        prompts = cell.prompts(1 + run, vocabulary)
        for name, side in sides.items():
            seconds.setdefault(name, []).append(seconds_of(side, cell, best[name], prompts))
    tokens = cell.rows * cell.completion
    speeds = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return speeds, min(cell.rows, best["ours"] // (cell.prompt + cell.completion))


def lines_of(
    name: str, cells: Sequence[Cell], args: argparse.Namespace, peaks: tuple[float, float]
) -> Iterator[str]:
    import torch
    from transformers import LlamaForCausalLM

    dtype, config = getattr(torch, args.dtype), llama_config(name)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(args.device, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with vllm_side(Path(folder), args) as vllm:
            ours = Ours(model, word_tokenizer(config.vocab_size))
            sides: dict[str, Any] = {"ours": ours, "generate": Generate(model)}
            sides |= {"vllm": vllm} if vllm else {}
            for cell in cells:
                speeds, batch = rates(sides, cell, args.runs, config.vocab_size)
                flops, moved = costs(config, cell, batch, dtype.itemsize)
                yield line(name, cell, speeds, flops * speeds["ours"] / peaks[0], moved, peaks[1])


HEADER = (
    "| model | prompt:completion | n | ours, tokens/s | generate | vLLM | ours / generate | "
    "ours / vLLM | of the peak FLOP/s | of the bandwidth |\n" + "|---" * 10 + "|"
)


def line(
    name: str, cell: Cell, speeds: dict[str, float], of_peak: float, moved: float, bandwidth: float
) -> str:
    ours, vllm = speeds["ours"], speeds.get("vllm")
    of_bandwidth = moved * ours / bandwidth
    return (
        f"| {name} | {cell.prompt}:{cell.completion} | {cell.n} | {ours:,.0f} | "
        f"{speeds['generate']:,.0f} | {f'{vllm:,.0f}' if vllm else '-'} | "
        f"{ours / speeds['generate']:.2f} | {f'{ours / vllm:.2f}' if vllm else '-'} | "
        f"{of_peak:.0%} | {of_bandwidth:.0%} |"
    )


def conditions(args: argparse.Namespace) -> str:
    """Describe the command, the hardware and the versions."""
    import torch
    import transformers

    device = f"a CPU with {args.threads} threads ({torch.backends.cpu.get_cpu_capability()})"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    return (
        f"`python {shlex.join(sys.argv)}` on {device}, {args.dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, medians of {args.runs} runs."
    )


def write_section(document: Path, script: str, lines: Sequence[str]) -> None:
    """Write `lines` between the script's markers in the document."""
    from bonbon.system.atomic_files import write_text

    begin, end = BEGIN.format(name=script), END.format(name=script)
    text = document.read_text(encoding="utf-8") if document.exists() else f"{begin}\n{end}\n"
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    write_text(document, head + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + tail)


def report(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    peaks = machine_peaks(args.device, getattr(torch, args.dtype))
    lines = [
        conditions(args),
        f"The machine: {peaks[0] / 1e9:,.0f} GFLOP/s in matrix products, {peaks[1] / 1e9:,.0f} "
        "GB/s read from memory.",
        "",
        HEADER,
    ]
    print("\n".join(lines), flush=True)
    for name in args.models:
        rows = args.rows or ROWS[name]
        cells = [
            Cell(prompt, completion, n, max(rows, n))
            for prompt, completion in (map(int, lengths.split(":")) for lengths in args.lengths)
            for n in args.n
        ]
        for text in lines_of(name, cells, args, peaks):
            lines.append(text)
            print(text, flush=True)
    if args.document:
        write_section(args.document, "sampling.py", lines)


def vllm_python() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("BONBON_VLLM_PYTHON", cache / "bonbon/vllm-env/bin/python"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LLAMAS, default=["260k", "demo", "100m"])
    parser.add_argument("--lengths", nargs="+", default=["32:64", "256:64", "1024:64"])
    parser.add_argument("--n", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rows", type=int, help="completions a run; default: by the model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--vllm", type=Path, default=vllm_python(), help="the Python of vLLM's environment"
    )
    parser.add_argument("--document", type=Path, help="write the table there, between its markers")
    parser.add_argument("--quick", action="store_true", help="two cells; vLLM is not compiled")
    parser.add_argument("--vllm-model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.vllm_model:
        serve_vllm(args)
        return
    if args.quick:
        args.models, args.lengths, args.n = ["260k", "demo"], ["256:64"], [8]
    report(args)


if __name__ == "__main__":
    main()
