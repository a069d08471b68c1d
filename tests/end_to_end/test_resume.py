"""A run that is killed again and again ends with what an undisturbed run ends with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from bonbon.config.run import parse_config
from bonbon.groups.shards import read_groups
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import run as run_stage
from bonbon.stages import train as train_stage
from bonbon.system.errors import BonbonError, DivergedError

KILLS = 5
DEADLINE = 240  # seconds, for a run that hangs


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, tiny_reward_model: Path) -> Path:
    """Small enough to run in seconds, with many shards and checkpoints to be killed between."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"A story about number {i} and\n" for i in range(30)))
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(tiny_model), "device": "cpu"},
                "prompts": {"path": str(prompts)},
                "sampling": {"n": 4, "max_new_tokens": 12, "shard_size": 2},
                "reward": {"model": str(tiny_reward_model), "device": "cpu"},
                "train": {"learning_rate": 1e-3, "epochs": 3, "batch_size": 4, "save_steps": 3},
                "evaluation": {"k": 2, "holdout": 0.3, "bootstrap": 100},
            }
        )
    )
    return path


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bonbon", "run", str(config), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def file_count(out: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(out))


def kill_at_a_random_moment(config: Path, out: Path, generator: random.Random) -> bool:
    """Kill a run once it has written a few more files; False when it came to its end before."""
    process = start(config, out)
    wanted = file_count(out) + generator.randint(1, 5)
    began = time.monotonic()
    while process.poll() is None and file_count(out) < wanted:
        assert time.monotonic() - began < DEADLINE
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.03))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def finish(config: Path, out: Path) -> None:
    process = start(config, out)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors.decode()


def test_killed_runs_lose_and_double_nothing(config: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(config, undisturbed)
    seed = random.randrange(10**6)
    print(f"seed of the moments: {seed}")  # shown when the test fails
    generator = random.Random(seed)
    kills = sum(kill_at_a_random_moment(config, killed, generator) for _ in range(KILLS))
    assert kills == KILLS
    finish(config, killed)

    for stage in ("samples", "groups"):
        expected, found = read_groups(undisturbed / stage), read_groups(killed / stage)
        assert list(found) == list(expected)
    for model in ("base", "rank_regression"):
        expected = read_groups(undisturbed / "evaluation" / model)
        found = read_groups(killed / "evaluation" / model)
        assert [g.prompt_id for g in found] == [g.prompt_id for g in expected]
    figures = [
        json.loads((out / "evaluation" / "evaluation.json").read_text())["models"][
            "rank_regression"
        ]
        for out in (undisturbed, killed)
    ]
    # Training that goes on from a checkpoint ends where it would have ended anyway.
    assert figures[1]["kl"]["value"] == pytest.approx(figures[0]["kl"]["value"], rel=1e-3)
    left = list(killed.rglob("*.tmp"))
    assert not left


def test_a_training_that_diverged_can_be_begun_anew(config: Path, tmp_path: Path) -> None:
    """With another learning rate, on the same groups; not with other groups."""
    values = yaml.safe_load(config.read_text())

    def folder_at(learning_rate: float) -> RunFolder:
        values["train"]["learning_rate"] = learning_rate
        return RunFolder(tmp_path / "out", parse_config(values))

    wild = folder_at(1e30)
    with wild.locked():
        run_stage.sample_and_score(wild)
        for _ in range(2):
            with pytest.raises(DivergedError, match="lower the learning rate"):
                train_stage.train(wild)
        assert not wild.checkpoints(wild.config.model_name).exists()
    tame = folder_at(1e-3)
    with tame.locked():
        train_stage.train(tame)
    assert (tame.path / "model" / "model.safetensors").is_file()
    assert "learning_rate: 0.001" in (tame.path / "config.yaml").read_text()


def test_a_training_that_came_to_nothing_can_be_changed(config: Path, tmp_path: Path) -> None:
    """One that has begun to learn cannot."""
    values = yaml.safe_load(config.read_text())

    def folder_with(**settings: Any) -> RunFolder:
        values["train"] |= settings
        return RunFolder(tmp_path / "out", parse_config(values))

    mistaken = folder_with(lora={"target_modules": ["no_such_layer"], "merge": True})
    with mistaken.locked():
        run_stage.sample_and_score(mistaken)
        with pytest.raises(BonbonError, match="this adapter does not fit the model"):
            train_stage.train(mistaken)
    killed = folder_with(lora=None, eval_fraction=0.2, eval_steps=2, epochs=1)
    with killed.locked():
        train_stage.train(killed)
    record = json.loads((killed.path / "model" / "training_log.json").read_text())
    assert record["groups"] > record["held_out_groups"] > 0
    assert any("eval_loss" in entry for entry in record["log"])
    with pytest.raises(BonbonError, match=r"epochs was 1\.0 and is now 2\.0"):
        train_stage.train(folder_with(epochs=2))
