"""Keys that were moved: refused in a user's file, read in an older run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bonbon.config.run import load_config, parse_config
from bonbon.config.settings import flatten
from bonbon.runs.fingerprints import train_settings
from bonbon.runs.run_folder import RunFolder
from bonbon.system.errors import BonbonError

OLD_TRAIN = {
    "adam_beta2": 0.98, "weight_decay": 0.0, "max_grad_norm": 10.0, "delta": 4.0,
    "share_prompt": None,
}  # fmt: skip


def values_of(tmp_path: Path, **train: Any) -> dict[str, Any]:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    return {
        "model": {"name": "m"},
        "prompts": {"path": str(prompts)},
        "reward": {"model": "r"},
        "train": train,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"adam_beta2": 0.9}}, "train.adam_beta2 is now train.arguments.adam_beta2"),
        (
            {"baselines": {"d": {"delta": 2}}},
            "baselines.d.delta is now baselines.d.arguments.delta",
        ),
        (
            {"sampler": {"name": "openai", "timeout": 3}},
            "sampler.timeout is now sampler.client.timeout",
        ),
        (
            {"reward": {"server": {"retries": 3}}},
            "reward.server.retries is now reward.server.client.retries",
        ),
        (
            {"evaluation": {"judge": {"model": "j", "retries": 3}}},
            "evaluation.judge.retries is now evaluation.judge.client.retries",
        ),
        (
            {"sampler": {"name": "vllm", "data_parallel_size": 1}},
            "sampler.data_parallel_size was removed: vLLM's offline engine runs one copy",
        ),
    ],
)
def test_an_old_key_is_refused_with_today_s(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BonbonError) as caught:
        parse_config(values_of(tmp_path) | changes)
    assert said in str(caught.value)


def old_note(folder: RunFolder, **train: Any) -> dict[str, Any]:
    """What a run noted before the keys were moved."""
    note = flatten(train_settings(folder.config, folder.rows, "rank_regression"))
    note = {key: it for key, it in note.items() if not key.startswith("train.arguments")}
    neutral = ("device", "max_batch_tokens")
    note = {key: it for key, it in note.items() if key.rpartition(".")[2] not in neutral}
    return note | {f"train.{name}": value for name, value in (OLD_TRAIN | train).items()}


@pytest.mark.parametrize(
    ("noted", "now"),
    [({}, {}), ({"adam_beta2": 0.9, "delta": 2.0}, {"adam_beta2": 0.9, "delta": 2.0})],
)
def test_an_old_run_s_training_is_resumed(
    tmp_path: Path, noted: dict[str, Any], now: dict[str, Any]
) -> None:
    config = parse_config(values_of(tmp_path, arguments={**now, "max_batch_tokens": 5}))
    folder = RunFolder(tmp_path / "run", config)
    note = tmp_path / "run" / ".bonbon" / "train.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(old_note(folder, **noted)))
    folder.notes.compare("train", train_settings(config, folder.rows, "rank_regression"))


def test_an_old_run_s_training_with_another_value_is_refused(tmp_path: Path) -> None:
    config = parse_config(values_of(tmp_path))
    folder = RunFolder(tmp_path / "run", config)
    note = tmp_path / "run" / ".bonbon" / "train.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(old_note(folder, adam_beta2=0.9)))
    with pytest.raises(
        BonbonError, match=r"train\.arguments\.adam_beta2 was 0\.9 and is now 0\.98"
    ):
        folder.notes.compare("train", train_settings(config, folder.rows, "rank_regression"))


def test_an_old_run_s_configuration_is_read_in_its_folder_alone(tmp_path: Path) -> None:
    values = values_of(tmp_path, **OLD_TRAIN, max_batch_tokens=7)
    values["sampler"] = {"name": "vllm", "data_parallel_size": 1, "tensor_parallel_size": 2}
    values["baselines"] = {"d": {"objective": "dpo", "delta": 2.0}}
    part = {"server": {"model": "a", "timeout": 9, "retries": 1}, "weight": 2}
    values["evaluation"] = {
        "rewards": {"gold": {"sum": [part]}},
        "judge": {"model": "j", "timeout": 5},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(BonbonError, match="is now"):
        load_config(path)
    (tmp_path / ".bonbon").mkdir()
    config = load_config(path)
    assert config.train.arguments.max_batch_tokens == 7
    assert config.baselines["d"].arguments.delta == 2.0
    gold = config.evaluation.rewards["gold"].sum
    assert gold is not None
    assert gold[0].server is not None
    assert (gold[0].server.client.timeout, gold[0].server.client.retries) == (9, 1)
    assert config.evaluation.judge is not None
    assert config.evaluation.judge.client.timeout == 5
    assert load_config(path) == config
