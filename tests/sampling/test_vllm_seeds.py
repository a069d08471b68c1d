"""What of the vLLM sampler needs no vLLM: its seeds, and what it refuses before it starts one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import ModelConfig, SamplingConfig, VllmSamplerConfig, VllmSettings
from bonbon.models.vllm_engine import Engine, own_output
from bonbon.rewards.vllm import VllmRewardModel
from bonbon.sampling.random_streams import request_seed
from bonbon.sampling.vllm import VllmSampler
from bonbon.system.errors import BonbonError

N = 32


def seeds_of(prompt_ids: list[str], seed: int = 0, stream: str = "", n: int = N) -> list[int]:
    """As vLLM numbers them: completion k of a request has its seed + k."""
    firsts = [request_seed(seed, stream, name) for name in prompt_ids]
    return [first + k for first in firsts for k in range(n)]


@pytest.mark.parametrize("bits", [64, 32])  # what CUDA's and torch's CPU generators use
def test_no_two_draws_of_a_run_share_a_seed(shared: Path, bits: int) -> None:
    lines = (shared / "data" / "stories" / "prompts.jsonl").read_text().splitlines()
    names = [json.loads(line)["prompt_id"] for line in lines]
    assert len(names) == 759
    seeds = [seed % 2**bits for seed in seeds_of(names)]
    assert len(set(seeds)) == len(seeds) == 759 * N


@given(
    first=st.integers(0, 10**9),
    seed=st.integers(0, 2**31),
    prefix=st.sampled_from(["", "p", "row-", "story-"]),
    stream=st.sampled_from(["", "base", "model"]),
)
def test_neighbours_share_no_seed(first: int, seed: int, prefix: str, stream: str) -> None:
    """Neither prompts with neighbouring ids nor runs with neighbouring seeds."""
    names = [f"{prefix}{first + k}" for k in range(8)]
    seeds = seeds_of(names, seed, stream) + seeds_of(names, seed + 1, stream)
    assert len(set(seeds)) == len(seeds) == 2 * 8 * N
    assert all(0 <= seed < 2**63 for seed in seeds)  # int64, in vLLM


@given(seed=st.integers(0, 2**31), name=st.text(max_size=8), n=st.integers(1, 2_000))
def test_draws_of_one_prompt_differ_in_the_low_bits(seed: int, name: str, n: int) -> None:
    seeds = seeds_of([name], seed, n=n)
    assert len({seed % 2**32 for seed in seeds}) == n
    assert max(seeds) < 2**63


@given(seed=st.integers(0, 2**31), name=st.text(max_size=8))
def test_streams_share_no_seed(seed: int, name: str) -> None:
    one, other = (seeds_of([name], seed, stream) for stream in ("base", "model"))
    assert not set(one) & set(other)


def test_seeds_stay_the_same_from_release_to_release() -> None:
    assert request_seed(0, "", "p0") == 7341495401749908767


def test_a_cpu_generator_uses_the_low_32_bits_alone() -> None:
    """Why `bonbon.sampling.random_streams` says what a shared seed means there."""
    seed = request_seed(0, "", "p0")
    draws = [
        torch.rand(4, generator=torch.Generator().manual_seed(number)).tolist()
        for number in (seed, seed % 2**32, seed + 1)
    ]
    assert draws[0] == draws[1] != draws[2]


# --- what is refused ------------------------------------------------------------------------------


def test_vllm_that_is_not_installed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name)
    )
    model = ModelConfig(name=str(tiny_model))
    for start in (
        lambda: VllmSampler(model, SamplingConfig(), VllmSamplerConfig()),
        lambda: VllmRewardModel(RewardConfig(model=str(tiny_model)), VllmSettings()),
    ):
        with pytest.raises(BonbonError, match=r"pip install 'bonbon-align\[vllm\]'"):
            start()


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_or_refuse(
    tiny_model: Path, temperature: float
) -> None:
    config = SamplingConfig(temperature=temperature)
    with pytest.raises(BonbonError, match=r"from 0.01 to 2.0, and sampling.temperature is"):
        VllmSampler(ModelConfig(name=str(tiny_model)), config, VllmSamplerConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": {"data_parallel_size": 2}}, "one copy of a model; have several samplers"),
        ({"engine": {"max_model_len": 9}}, "engine.max_model_len .* a setting of its own"),
        ({"engine": {"dtype": "float16"}}, "engine.dtype .* BoNBoN's own"),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bonbon.models.vllm_engine.import_vllm", lambda: None)
    with pytest.raises(BonbonError, match=message):
        Engine("model m", VllmSettings(**settings), dtype="float32")


def test_what_an_engine_prints_goes_to_a_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    os.write(1, b"before\n")
    with own_output() as output:
        os.system("echo a process; echo and its errors >&2")
        os.write(2, b"and this one")
        assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    os.write(1, b"after\n")
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    assert output is not None
    output.seek(0)
    assert output.read().split() == b"a process and its errors and this one".split()
    assert capfd.readouterr() == ("before\nafter\n", "")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    with own_output() as output:
        os.write(1, b"all of it")
    assert output is None
    assert capfd.readouterr().out == "all of it"


GUARDED = """
import multiprocessing, os, sys, time
from bonbon.models.vllm_engine import _guard_of
if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    process.start()
    guard = _guard_of(multiprocessing.active_children())
    print(process.pid, flush=True)
    if sys.argv[1:] == ["close"]:
        guard.communicate(b"\\n")
        print(guard.returncode, process.is_alive(), flush=True)
        process.kill()
    else:
        os.kill(os.getpid(), 9)
"""


def test_an_engine_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", GUARDED]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9
    deadline = time.monotonic() + 10
    while Path(f"/proc/{killed.stdout.strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    closed = subprocess.run([*command, "close"], capture_output=True, text=True, timeout=60)
    assert closed.stdout.splitlines()[1] == "0 True"
