"""Several processes train as one does: the same batches, the same mean, the same model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from bonbon.config.run import parse_config
from bonbon.groups.group import Groups
from bonbon.groups.shards import shard_path, write_shard
from bonbon.models.loading import load_policy
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import sample as sample_stage
from bonbon.stages import score as score_stage
from bonbon.stages import train as train_stage
from bonbon.system.errors import BonbonError
from bonbon.training.batches import GroupBatches, Part, Processes, deal
from bonbon.training.reference_logprobs import FILE as REFERENCE_LOGPS
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer
from support import one_machine, train_in_processes
from support.models import BOS, EOS, PAD, build_tiny_model, byte_tokenizer
from support.training import random_group

DEADLINE = 240  # seconds, for processes that hang

# --- who does what, without processes -------------------------------------------------------------

sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


def shapes_of(lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Of groups of two completions."""
    return [(prompt, 2, width) for prompt, width in lengths]


@settings(max_examples=200, deadline=None)
@given(
    lengths=sizes,
    batch_size=st.integers(1, 12),
    world=st.integers(1, 9),
    window=st.integers(1, 5),
    tokens=st.sampled_from([1, 100, 300, 10**6]),
    epoch=st.integers(0, 3),
    seed=st.none() | st.integers(0, 5),
)
def test_every_group_counts_once_an_epoch(
    lengths: list[tuple[int, int]],
    batch_size: int,
    world: int,
    window: int,
    tokens: int,
    epoch: int,
    seed: int | None,
) -> None:
    """With the same weight as all others of its window, whatever the processes."""
    groups = shapes_of(lengths)

    def batches(processes: Processes) -> list[list[Part]]:
        loader = GroupBatches(
            groups, batch_size, tokens, window=window, seed=seed, processes=processes
        )
        loader.set_epoch(epoch)
        found = list(loader)
        assert len(found) == len(loader)
        return found

    ranks = [batches(Processes(world, rank)) for rank in range(world)]
    alone = batches(Processes())
    assert {len(rank) for rank in ranks} == {len(alone)}
    seen: Counter[int] = Counter()
    for start in range(0, len(alone), window):
        counts: dict[int, float] = {}
        steps = range(start, min(start + window, len(alone)))
        for step in steps:
            shared = [rank[step] for rank in ranks]
            assert len({len(parts) for parts in shared}) == 1  # as many forward passes each
            real = [part for parts in shared for part in parts if part.share > 0]
            assert all(len(part.indices) == 1 for p in shared for part in p if part.share == 0)
            indices = sorted(i for part in real for i in part.indices)
            assert indices == sorted(i for part in alone[step] for i in part.indices)
            for part in real:
                # The average over processes and steps of a mean over the part's groups.
                for index in part.indices:
                    counts[index] = part.share / len(part.indices) / world / len(steps)
            seen.update(indices)
        for count in counts.values():
            assert count == pytest.approx(1 / len(counts))
    assert seen == Counter(range(len(groups)))


@given(lengths=sizes, world=st.integers(1, 9), tokens=st.integers(1, 400))
@settings(deadline=None)
def test_parts_stay_within_the_tokens_of_a_pass(
    lengths: list[tuple[int, int]], world: int, tokens: int
) -> None:
    parts = deal(shapes_of(lengths), tokens, world)
    assert parts
    for part in parts:
        assert len(part) == world
        assert max(map(len, part)) - min(map(len, part)) <= 1
        for own in part:
            prompt = max((lengths[i][0] for i in own), default=0)
            width = max((lengths[i][1] for i in own), default=0)
            assert len(own) == 1 or 2 * len(own) * (prompt + width) <= tokens


def test_a_batch_is_not_cut_more_often_than_it_must(tiny_model: Path) -> None:
    """Parts of like length hold as many groups as fit."""
    groups = shapes_of([(5, 5)] * 12)  # 20 tokens each
    dealt = deal(groups, 60, 2)
    assert [[len(own) for own in part] for part in dealt] == [[3, 3], [3, 3]]
    long_first = shapes_of([(5, 5), (5, 25), (5, 5), (5, 25)])
    assert deal(long_first, 60, 2) == [[[1], [3]], [[0], [2]]]


def test_the_last_batch_may_be_left_out() -> None:
    groups = shapes_of([(3, 3)] * 7)
    batches = GroupBatches(groups, 3, 10**6, drop_last=True)
    assert [sum(len(part.indices) for part in parts) for parts in batches] == [3, 3]
    assert len(batches) == 2


def test_one_process_gets_the_batches_that_transformers_makes(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    """In each epoch: `GroupLoader` differs from the `Trainer`'s loader in what it says of them."""
    for data_seed in (None, 5):
        args = BoNBoNConfig(
            str(tmp_path), use_cpu=True, report_to="none", seed=3, data_seed=data_seed,
            per_device_train_batch_size=4, max_batch_tokens=10**6,
        )  # fmt: skip
        trainer = BoNBoNTrainer(str(tiny_model), args, groups)
        torch.manual_seed(args.seed)
        ours = trainer.get_train_dataloader()
        trainer.data_collator = lambda batch: {"ids": [group.prompt_id for group in batch]}
        theirs: Any = Trainer.get_train_dataloader(trainer)
        for epoch in range(3):
            theirs.set_epoch(epoch)
            ours.set_epoch(epoch)
            expected = [sorted(batch["ids"]) for batch in theirs]
            assert expected == [
                sorted(trainer.train_dataset[i].prompt_id for part in parts for i in part.indices)
                for parts in ours.batch_sampler
            ]
        assert isinstance(ours, DataLoader)


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("machines", ["a a b b", "a b a b", "a b b b"])
def test_each_machine_is_asked_once(machines: str, tmp_path: Path) -> None:
    """However the launcher numbers the processes."""
    names = machines.split()
    run = ("torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    finish(start(*run, one_machine.__file__, str(tmp_path), MACHINES=machines))
    for rank, name in enumerate(names):
        first = names.index(name)
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [f"{name}, by process {first}", int(rank == first)]


@pytest.fixture(scope="module")
def groups() -> Groups:
    """23, which no batch size of the tests divides."""
    generator = np.random.default_rng(0)
    return Groups([random_group(i, generator, list(generator.normal(size=4))) for i in range(23)])


def build_tiny_gpt2(folder: Path) -> None:
    """A model that computes in float64 throughout; a Llama's norms are in float32."""
    config = GPT2Config(
        vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | own | environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    return said


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# It starts several processes for GPUs alone; without a GPU they are on the CPU.
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
SCRIPT = str(Path(train_in_processes.__file__))

FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-recompute": {"logprobs": "recompute", "optim": "sgd"},
    "ddp-double": {"dtype": "float64", "optim": "sgd"},
    "ddp-whole-batches": {"max_batch_tokens": 10**6, "share_prompt": True},
    "ddp-more-processes-than-groups": {"global_batch_size": 1, "gradient_accumulation_steps": 3},
    "ddp-lora": {"lora": True},
    "ddp-kl-budget": {"kl_budget": 0.01, "learning_rate": 1e-2, "kl_prompts": 3, "kl_samples": 2},
    "fsdp": FSDP | {"logprobs": "recompute"},
    "fsdp-checkpointing": FSDP | {"gradient_checkpointing": True, "global_batch_size": 1},
    "fsdp-lora": FSDP | {"lora": True},
}


def case(
    root: Path, name: str, processes: int, dtype: str = "float32", lora: bool = False, **own: Any
) -> dict[str, Any]:
    """What tests/support/train_in_processes.py is to train into `root`/NAME-PROCESSES."""
    values = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "global_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "max_batch_tokens": 180,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | own
    if processes == 1:
        values = {key: value for key, value in values.items() if key not in FSDP}
    out = root / f"{name}-{processes}"
    out.mkdir()
    return {
        "groups": str(root / "groups"),
        "model": str(root / ("gpt2" if dtype == "float64" else "llama")),
        "out": str(out),
        "held_out": 7,
        "dtype": dtype,
        "lora": lora,
        "settings": values,
    }


@pytest.fixture(scope="module")
def trained(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by one process (NAME-1) and by two (NAME-2)."""
    root = tmp_path_factory.mktemp("trained")
    write_shard(shard_path(root / "groups", 0), list(groups), {})
    build_tiny_model(root / "llama")
    build_tiny_gpt2(root / "gpt2")
    cases = [case(root, name, 2, **own) for name, own in CASES.items()]
    (root / "two.json").write_text(json.dumps(cases))
    process = start(*TORCHRUN, SCRIPT, str(root / "two.json"))
    for name, own in CASES.items():
        train_in_processes.train(case(root, name, 1, **own))
    finish(process)
    return root


def saved(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for file in folder.glob("*.safetensors") if file.name != REFERENCE_LOGPS]
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(trained: Path, name: str) -> None:
    """To 1e-5 in float32 and to 1e-10 in float64, with uneven last batches, windows and parts."""
    one, two = saved(trained / f"{name}-1"), saved(trained / f"{name}-2")
    assert_same(one, two, atol=1e-10 if "double" in name else 1e-5)
    logs = [json.loads((trained / f"{name}-{n}" / "log.json").read_text()) for n in (1, 2)]
    assert logs[1]["sharded"] == name.startswith("fsdp")
    assert len(logs[0]["history"]) > 3


@pytest.mark.parametrize("name", CASES)
def test_what_is_logged_is_the_mean_over_all_processes(trained: Path, name: str) -> None:
    logs = [json.loads((trained / f"{name}-{n}" / "log.json").read_text()) for n in (1, 2)]
    assert any("accuracy" in entry for entry in logs[0]["history"])
    assert "eval_accuracy" in logs[0]["evaluation"]
    for one, two in zip(*(log["history"] for log in logs), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {key for key in one if "runtime" in key or "second" in key}:
            if "logprobs" in CASES[name] and "accuracy" in key:
                continue  # at the first step the sign of rounding errors
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_the_trainings_go_somewhere(trained: Path) -> None:
    """So that the same weights are no empty words."""
    before, after = saved(trained / "llama"), saved(trained / "ddp-1")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    shares = [
        entry["kl_budget_share"]
        for entry in json.loads((trained / "ddp-kl-budget-2" / "log.json").read_text())["history"]
        if "kl_budget_share" in entry
    ]
    assert len(shares) == 1
    assert 0 < shares[0] < 1


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(trained: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {
        "zero_optimization": zero | {"stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
    } | dict.fromkeys(auto, "auto")
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    own = case(trained, f"zero-{stage}", 2, use_cpu=False, ddp_backend="gloo")
    (tmp_path / "case.json").write_text(json.dumps([own]))
    finish(
        start(
            *TORCHRUN,
            SCRIPT,
            str(tmp_path / "case.json"),
            DS_ACCELERATOR="cpu",
            ACCELERATE_USE_DEEPSPEED="true",
            ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "deepspeed.json"),
        )
    )
    assert_same(saved(trained / "ddp-1"), saved(trained / f"zero-{stage}-2"), atol=1e-5)


# --- bonbon train ---------------------------------------------------------------------------------

BONBON = ("-m", "bonbon")
FSDP_ON_CPU = (SCRIPT, "bonbon")
SHARDED = (
    "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
    "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
MODELS = ("model", "baselines/adapter")


@pytest.fixture(scope="module")
def config(
    tiny_model: Path, tiny_reward_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A long training with many checkpoints, and a short one of an adapter before it."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"A story about number {i} and\n" for i in range(23)))
    values = {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "prompts": {"path": str(prompts)},
        "sampling": {"n": 4, "max_new_tokens": 8},
        "reward": {"model": str(tiny_reward_model), "device": "cpu"},
        "train": {
            "learning_rate": 1e-3,
            "epochs": 14,
            "batch_size": 5,
            "gradient_accumulation_steps": 2,
            "save_steps": 2,
        },
        "baselines": {
            "adapter": {
                "objective": "bonbon",
                "learning_rate": 1e-3,
                "batch_size": 5,
                "lora": {"r": 2, "merge": True},
            }
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_folder(config: Path, path: Path) -> RunFolder:
    return RunFolder(path, parse_config(yaml.safe_load(config.read_text())))


@pytest.fixture(scope="module")
def scored(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with scored groups."""
    folder = run_folder(config, tmp_path_factory.mktemp("scored") / "out")
    sample_stage.sample(folder)
    score_stage.score(folder)
    return folder.path


@pytest.fixture(scope="module")
def alone(config: Path, scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains undisturbed."""
    return train_alone(config, scored, tmp_path_factory.mktemp("alone") / "out")


def train_alone(config: Path, source: Path, path: Path) -> Path:
    shutil.copytree(source, path)
    train_stage.train(run_folder(config, path))
    return path


def train_together(launcher: Sequence[str], config: Path, out: Path) -> subprocess.Popen[str]:
    return start(*launcher, "train", str(config), "--out", str(out))


def kill_one_process(process: subprocess.Popen[str], out: Path) -> None:
    """The second one, with SIGKILL, once it has trained for a while; the launcher ends the rest."""
    began = time.monotonic()
    checkpoints = out / ".bonbon" / "train-checkpoints"
    while not list(checkpoints.glob("checkpoint-[4-9]*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < DEADLINE
        time.sleep(0.01)
    (victim,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1"
    ]
    victim.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert not (out / "model").exists(), said


def assert_same_models(one: Path, other: Path) -> None:
    """As `load_policy` reads them."""
    for name in MODELS:
        expected, found = (load_policy(str(path / name), device="cpu")[0] for path in (one, other))
        assert_same(dict(expected.state_dict()), dict(found.state_dict()), atol=1e-5)
        assert not list((other / name).rglob("*.bin"))
    logs = [json.loads((path / "model" / "training_log.json").read_text()) for path in (one, other)]
    steps = [[entry["step"] for entry in log["log"]] for log in logs]
    assert steps[0] == steps[1]
    assert not list(other.rglob("*.tmp"))
    assert not (other / ".bonbon" / "train-checkpoints").exists()


def test_a_killed_training_goes_on_with_any_number_of_processes(
    config: Path, scored: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    kill_one_process(train_together((*TORCHRUN, *BONBON), config, out), out)
    copy = train_alone(config, out, tmp_path / "one")
    said = finish(train_together((*ACCELERATE, *BONBON), config, out))
    assert said.count(f"model: {out / 'model'}") == 1
    assert_same_models(alone, copy)
    assert_same_models(alone, out)


def test_sharded_weights_train_are_resumed_and_saved_as_whole_ones(
    config: Path, scored: Path, alone: Path, tmp_path: Path
) -> None:
    """FSDP2: two processes, one of them killed, then one."""
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    two = (*SHARDED, "--num_processes", "2", *FSDP_ON_CPU)
    kill_one_process(train_together(two, config, out), out)
    with pytest.raises(BonbonError, match="begun with FSDP and cannot be resumed with whole"):
        train_alone(config, out, tmp_path / "copy")
    one = (*SHARDED, "--num_processes", "1", *FSDP_ON_CPU)
    finish(train_together(one, config, out))
    assert_same_models(alone, out)


def test_only_training_runs_in_several_processes(config: Path, tmp_path: Path) -> None:
    """And what all processes find wrong is said once."""
    process = start(*TORCHRUN, *BONBON, "sample", str(config), "--out", str(tmp_path / "out"))
    said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert said.count("bonbon: ") == 1
    assert "`bonbon sample` works in one process and 2 were started" in said
    assert not (tmp_path / "out").exists()
