"""The whole pipeline on a real pretrained model with a real reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonbon.config.run import parse_config
from bonbon.groups.prompts import read_prompts
from bonbon.groups.shards import read_groups
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import evaluate as evaluate_stage
from bonbon.stages import run as run_stage
from bonbon.stages import train as train_stage
from bonbon.system.errors import BonbonError
from bonbon.tilt.best_of_n import BestOfN

pytest.importorskip("vaderSentiment")

N, K = 8, 4


@pytest.fixture(scope="module")
def folder(shared: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run over all of the shared story openings, judged by VADER's sentiment."""
    prompts = str(shared / "data" / "stories" / "prompts.jsonl")
    config = parse_config(
        {
            "model": {"name": str(stories260k), "device": "cpu"},
            "prompts": {"path": prompts, "split": "train"},
            "sampling": {"n": N, "max_new_tokens": 32},
            "reward": {"function": "bonbon.demo.sentiment:compound"},
            "train": {"objective": "bonbon", "learning_rate": 6e-5},
            "baselines": {
                "adapter": {"objective": "ipo_bon", "learning_rate": 1e-3, "lora": {"r": 4}},
            },
            "evaluation": {"prompts": {"path": prompts, "split": "eval"}, "k": K},
        }
    )
    run_folder = RunFolder(tmp_path_factory.mktemp("run") / "out", config)
    with run_folder.locked():
        run_stage.run(run_folder)
    return run_folder


def figures(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.evaluation / "evaluation.json").read_text())["models"]


def test_every_prompt_has_its_scored_group(folder: RunFolder, shared: Path) -> None:
    rows = read_prompts(shared / "data" / "stories" / "prompts.jsonl", split="train")
    groups = read_groups(folder.groups)
    assert [group.prompt_id for group in groups] == [row.prompt_id for row in rows]
    assert {group.n for group in groups} == {N}
    assert all(np.isfinite(group.rewards).all() for group in groups)
    assert groups.provenance["reward"] == {"function": "bonbon.demo.sentiment:compound"}
    assert groups.provenance["sampling"]["temperature"] == 1.0


def test_best_of_n_wins_what_theory_says(folder: RunFolder) -> None:
    best = figures(folder)[f"best-of-{N}"]
    # Ties can only lower it, and few rewards tie.
    assert best["win_rate"]["low"] < BestOfN(N).win_rate()
    assert best["win_rate"]["value"] == pytest.approx(BestOfN(N).win_rate(), abs=0.02)


@pytest.mark.parametrize("name", ["bonbon", "adapter"])
def test_the_trained_models_win_within_the_limit(folder: RunFolder, name: str) -> None:
    model = figures(folder)[name]
    assert set(model) >= {"win_rate", "kl", "recovered", "kl_efficiency", "length_change"}
    for figure in ("win_rate", "kl", "recovered", "kl_efficiency", "length_change"):
        value = model[figure]
        assert value["low"] <= value["value"] <= value["high"]
    assert model["win_rate"]["low"] > 0.55
    assert model["kl"]["low"] > 0
    assert 0 < model["kl_efficiency"]["low"] <= 1
    gain = figures(folder)[f"best-of-{N}"]["win_rate"]["value"] - 0.5
    recovered = (model["win_rate"]["value"] - 0.5) / gain
    assert model["recovered"]["value"] == pytest.approx(recovered)


def test_the_model_is_an_ordinary_folder_with_a_card(folder: RunFolder) -> None:
    target = folder.model("bonbon")
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert not list(folder.path.rglob("*.bin"))
    win = figures(folder)["bonbon"]["win_rate"]["value"]
    card = (target / "README.md").read_text()
    assert f"{win:.3f}" in card
    assert "were left out because all their rewards tied" in card
    assert (folder.model("adapter") / "adapter_model.safetensors").is_file()


def test_what_the_evaluation_drew_is_counted_once(folder: RunFolder) -> None:
    cost = json.loads((folder.evaluation / "evaluation.json").read_text())["cost"]
    drawn = [read_groups(path) for path in folder.evaluation.glob("*-samples")]
    assert len(drawn) == 3
    tokens = sum(sum(group.lengths()) for groups in drawn for group in groups)
    assert cost["evaluation"]["tokens"] == tokens
    assert cost["sampling"]["tokens"] == sum(sum(g.lengths()) for g in read_groups(folder.groups))


def test_the_same_command_again_makes_nothing_again(folder: RunFolder) -> None:
    def made() -> dict[Path, int]:
        files = [*folder.path.rglob("*.parquet"), *folder.path.rglob("*.safetensors")]
        return {path: path.stat().st_mtime_ns for path in files}

    before, first = made(), figures(folder)
    with folder.locked():
        run_stage.run(folder)
    assert made() == before
    assert figures(folder) == first


def test_a_model_is_not_taken_for_one_of_another_objective(folder: RunFolder) -> None:
    values = folder.config.model_dump(mode="json")
    values["train"]["objective"] = "dpo"
    other = RunFolder(folder.path, parse_config(values))
    for stage in (train_stage.train, evaluate_stage.evaluate):
        with pytest.raises(BonbonError, match=r"train\.objective was 'bonbon' and is now 'dpo'"):
            stage(other)
    assert "objective: bonbon" in (folder.path / "config.yaml").read_text()


def test_an_evaluation_refuses_models_trained_otherwise(folder: RunFolder) -> None:
    values = folder.config.model_dump(mode="json")
    values["baselines"]["adapter"]["learning_rate"] = 5.0
    with pytest.raises(BonbonError, match=r"train\.learning_rate was 0\.001 and is now 5\.0"):
        evaluate_stage.evaluate(RunFolder(folder.path, parse_config(values)))
