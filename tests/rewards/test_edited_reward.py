"""A reward that was edited or replaced since a run began: noticed, named, and refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bonbon.config.reward import RewardConfig
from bonbon.config.run import parse_config
from bonbon.groups.shards import read_groups, shard_path
from bonbon.rewards.identity import reward_identity, same_reward
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.stages import score as score_stage
from bonbon.stages import train as train_stage
from bonbon.system.errors import BonbonError

CODE = "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
EDITED = CODE.replace("float(len(text))", "-float(len(text))")
MakeFolder = Callable[[Any], RunFolder]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with prompts, and the function `edited_lengths:score`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("".join(f"number {i}\n" for i in range(8)))
    write_code(tmp_path, CODE)
    return tmp_path


def write_code(place: Path, code: str) -> None:
    """As a new process would find it."""
    (place / "edited_lengths.py").write_text(code)
    sys.modules.pop("edited_lengths", None)
    importlib.invalidate_caches()


@pytest.fixture
def folder_of(place: Path, tiny_model: Path) -> MakeFolder:
    def make(reward: Any, **changes: Any) -> RunFolder:
        values = {
            "model": {"name": str(tiny_model), "device": "cpu"},
            "prompts": {"path": "prompts.txt"},
            "sampling": {"n": 2, "max_new_tokens": 4, "shard_size": 4},
            "reward": reward,
            "train": {"learning_rate": 1e-3},
            "evaluation": {"prompts": {"path": "prompts.txt"}, "k": 2, "bootstrap": 100},
        }
        return RunFolder(place / "out", parse_config(values | changes))

    return make


FUNCTION = {"function": "edited_lengths:score"}
CHANGED = r"the code of reward function edited_lengths:score changed since this run began"


def stopped_while_scoring(folder: RunFolder) -> None:
    run_stage.sample_and_score(folder)
    shard_path(folder.groups, 1).unlink()
    (folder.path / ".bonbon" / "score.done.json").unlink()


def note_of(folder: RunFolder, stage: str = "score") -> dict[str, Any]:
    return json.loads((folder.path / ".bonbon" / f"{stage}.json").read_text())


def without_digests_noted(folder: RunFolder) -> None:
    """The notes as they were before digests of rewards were in them."""
    for path in (folder.path / ".bonbon").glob("*.json"):
        values = json.loads(path.read_text())
        kept = {k: v for k, v in values.items() if k.rpartition(".")[2] not in ("code", "weights")}
        path.write_text(json.dumps(kept, indent=2) + "\n")


@pytest.mark.parametrize("reward", [FUNCTION, {"sum": [{"function": "math:e"}, FUNCTION]}])
def test_an_edited_function_is_refused_between_shards(
    place: Path, folder_of: MakeFolder, reward: dict[str, Any]
) -> None:
    folder = folder_of(reward)
    if "sum" in reward:  # of which the first part cannot be scored with
        sample_stage.sample(folder)
        score_stage.begin_scoring(folder)
        shutil.copytree(folder.samples, folder.groups)
        shard_path(folder.groups, 1).unlink()
    else:
        stopped_while_scoring(folder)
    write_code(place, EDITED)
    for stage in (score_stage.score, run_stage.sample_and_score):
        with pytest.raises(BonbonError, match=rf"{CHANGED}; .*choose another --out, or undo"):
            stage(folder_of(reward))
    assert not shard_path(folder.groups, 1).exists()
    assert "edited_lengths" not in sys.modules  # it was refused before anything was loaded


def test_a_function_that_is_as_it_was_goes_on(place: Path, folder_of: MakeFolder) -> None:
    folder = folder_of(FUNCTION)
    stopped_while_scoring(folder)
    write_code(place, CODE)
    score_stage.score(folder_of(FUNCTION))
    assert len(read_groups(folder.groups)) == 8


def test_a_finished_run_is_not_done_again_with_an_edited_function(
    place: Path, folder_of: MakeFolder
) -> None:
    folder = folder_of(FUNCTION)
    run_stage.sample_and_score(folder)
    train_stage.train(folder)
    write_code(place, EDITED)
    for stage in (score_stage.score, train_stage.train, run_stage.run):
        with pytest.raises(BonbonError, match=CHANGED):
            stage(folder_of(FUNCTION))
    write_code(place, CODE)
    train_stage.train(folder_of(FUNCTION))
    # The way out that keeps the samples.
    write_code(place, EDITED)
    for made in (folder.groups, folder.model(folder.config.model_name)):
        shutil.rmtree(made)
    score_stage.score(folder_of(FUNCTION))
    assert all(max(group.rewards or ()) <= 0 for group in read_groups(folder.groups))
    train_stage.train(folder_of(FUNCTION))


def test_a_sampled_run_may_still_change_its_function(place: Path, folder_of: MakeFolder) -> None:
    sample_stage.sample(folder_of(FUNCTION))
    write_code(place, EDITED)
    score_stage.score(folder_of(FUNCTION))


def test_notes_without_digests_are_taken_and_completed(place: Path, folder_of: MakeFolder) -> None:
    folder = folder_of(FUNCTION)
    stopped_while_scoring(folder)
    without_digests_noted(folder)
    write_code(place, EDITED)  # which nobody can tell any more
    score_stage.score(folder_of(FUNCTION))
    assert note_of(folder)["reward.code"]
    write_code(place, CODE)
    with pytest.raises(BonbonError, match=CHANGED):
        score_stage.score(folder_of(FUNCTION))


def test_a_function_that_cannot_be_found_any_more_is_no_other(
    place: Path, folder_of: MakeFolder
) -> None:
    """What is finished needs it no more."""
    folder = folder_of(FUNCTION)
    run_stage.sample_and_score(folder)
    (place / "edited_lengths.py").unlink()
    before = note_of(folder)
    score_stage.score(folder_of(FUNCTION))
    assert note_of(folder) == before
    train_stage.train(folder_of(FUNCTION))


def test_replaced_weights_are_refused(
    place: Path, folder_of: MakeFolder, tiny_reward_model: Path
) -> None:
    shutil.copytree(tiny_reward_model, place / "reward")
    reward = {"model": "reward", "device": "cpu"}
    stopped_while_scoring(folder_of(reward))
    weights = place / "reward" / "model.safetensors"
    values = load_file(weights)
    name = sorted(values)[0]
    save_file(values | {name: values[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(BonbonError, match="the weights of reward model reward changed since"):
        score_stage.score(folder_of(reward))


def test_another_function_is_named_alone(place: Path, folder_of: MakeFolder) -> None:
    stopped_while_scoring(folder_of(FUNCTION))
    (place / "other_lengths.py").write_text(EDITED)
    with pytest.raises(BonbonError, match=r"reward\.function was 'edited.*' and is now") as refused:
        score_stage.score(folder_of({"function": "other_lengths:score"}))
    assert "the code of" not in str(refused.value)


def test_two_runs_with_other_code_do_not_share_a_store(place: Path, folder_of: MakeFolder) -> None:
    folder = folder_of(FUNCTION, storage=str(place / "store"))
    run_stage.sample_and_score(folder)
    write_code(place, EDITED)
    other = RunFolder(place / "second", folder.config)
    with pytest.raises(BonbonError, match=CHANGED):
        run_stage.sample_and_score(other)
    (place / "edited_lengths.py").unlink()
    third = RunFolder(place / "third", folder.config)
    assert sample_stage.begin_sampling(third)
    assert score_stage.begin_scoring(third)
    for stage in ("sample", "score"):
        third.finish_data(stage)


# --- identities -----------------------------------------------------------------------------------


def identity(**reward: Any) -> dict[str, Any]:
    return reward_identity(RewardConfig(**reward))


def test_code_is_that_of_the_file_that_defines_the_function(place: Path) -> None:
    (place / "scores").mkdir()
    (place / "scores" / "__init__.py").write_text("from .lengths import score as by_length\n")
    (place / "scores" / "lengths.py").write_text(CODE)
    assert identity(function="scores:by_length")["code"] == identity(**FUNCTION)["code"]
    (place / "scores" / "lengths.py").write_text(EDITED)
    assert identity(function="scores:by_length")["code"] != identity(**FUNCTION)["code"]
    assert "scores.lengths" not in sys.modules
    assert identity(function="nowhere:score")["code"] is None
    assert identity(function="sys:getrefcount")["code"] is None


def test_a_server_is_its_model_or_its_address(place: Path) -> None:
    one, other = ({"base_url": f"http://127.0.0.1:{port}"} for port in (1, 2))
    assert not same_reward(identity(server=one), identity(server=other))
    named = [identity(server={**server, "model": "m"}) for server in (one, other)]
    assert same_reward(*named)


def test_a_hub_model_s_weights_are_those_in_the_cache(
    place: Path, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file, revision: str(tiny_reward_model / file) if name == "org/r" else None,
    )
    cached = identity(model="org/r")
    assert cached["weights"] == identity(model=str(tiny_reward_model))["weights"] is not None
    assert identity(model="org/other")["weights"] is None
    assert same_reward(cached, cached | {"weights": None})
    assert not same_reward(cached, cached | {"weights": "0"})
    assert not same_reward(cached, identity(model="org/other"))
