"""What a run's folder notes, compares and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bonbon.config.run import RunConfig, parse_config
from bonbon.groups.shards import shard_path
from bonbon.runs.run_folder import RunFolder
from bonbon.system.digests import file_digest
from bonbon.system.errors import BonbonError

MINIMAL = {"model": {"name": "m"}, "prompts": {"path": "p.jsonl"}, "reward": {"model": "r"}}


def folder_at(path: Path, **changes: Any) -> RunFolder:
    return RunFolder(path, parse_config(MINIMAL | changes))


def dumped(config: RunConfig, *parts: str) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(parts))


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the lock and strangers -----------------------------------------------------------------------


def test_the_folder_is_made_and_held(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "new" / "run")
    with (
        folder.locked(),
        pytest.raises(BonbonError, match=r"another bonbon process .*new/run"),
        folder_at(tmp_path / "new" / "run").locked(),
    ):
        pytest.fail("two hold the folder")
    with folder.locked():
        assert (tmp_path / "new" / "run").is_dir()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with pytest.raises(RuntimeError, match="stage"), folder.locked():
        raise RuntimeError("stage")
    with folder.locked():
        pass


def test_a_stranger_s_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(BonbonError, match=r"holds no run \(thesis.tex is in it\)"),
        folder_at(tmp_path).locked(),
    ):
        pytest.fail("a stranger's folder was taken")
    assert contents(tmp_path) == ["thesis.tex"]


def test_a_run_s_folder_is_taken_again(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with folder.locked():
        folder.notes.begin("sample", {})
        folder.samples.mkdir()
    with folder.locked():
        assert folder.samples.is_dir()


@pytest.mark.parametrize("below", ["", "deep/run"], ids=["itself", "below"])
def test_a_regular_file_as_folder_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(BonbonError, match="cannot write the output folder"),
        folder_at(tmp_path / "file" / below).locked(),
    ):
        pytest.fail("a file was taken for a folder")


# --- begin and finish -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_settings_go_on(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    settings = dumped(folder.config, "model", "prompts", "sampling")
    folder.notes.begin("sample", settings)
    folder.notes.begin("sample", settings)
    assert parse_config_file(tmp_path / "config.yaml") == folder.config


def parse_config_file(path: Path) -> RunConfig:
    from bonbon.config.run import load_config

    return load_config(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"name": "other"}}, r"model\.name was 'm' and is now 'other'"),
        ({"sampling": {"n": 4}}, r"sampling\.n was 8 and is now 4"),
        ({"sampling": {"temperature": 0.7}}, r"sampling\.temperature was 1\.0 and is now 0\.7"),
        ({"prompts": {"path": "p.jsonl", "limit": 3}}, r"prompts\.limit was None and is now 3"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    first, second = folder_at(tmp_path), folder_at(tmp_path, **changes)
    first.notes.begin("sample", dumped(first.config, "model", "prompts", "sampling"))
    before = (tmp_path / ".bonbon" / "sample.json").read_text()
    with pytest.raises(BonbonError, match=named):
        second.notes.begin("sample", dumped(second.config, "model", "prompts", "sampling"))
    assert (tmp_path / ".bonbon" / "sample.json").read_text() == before


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    folder.notes.begin("sample", {f"k{i}": 0 for i in range(8)})
    with pytest.raises(BonbonError, match=r"k4 was 0 and is now 1 and 3 more; choose"):
        folder.notes.begin("sample", {f"k{i}": 1 for i in range(8)})


def test_neutral_settings_are_not_compared(tmp_path: Path) -> None:
    part = {"function": "a:f", "max_batch_tokens": 10, "device": "cpu"}
    first = folder_at(tmp_path, reward={"sum": [part]})
    part = part | {"max_batch_tokens": 99, "device": "cuda"}
    second = folder_at(
        tmp_path,
        model={"name": "m", "device": "cuda"},
        sampling={"max_batch_tokens": 5},
        reward={"sum": [part]},
    )
    for folder in (first, second):
        folder.notes.begin("score", dumped(folder.config, "model", "sampling", "reward"))
    third = folder_at(tmp_path, reward={"sum": [part | {"function": "b:g"}]})
    with pytest.raises(BonbonError, match=r"reward\.sum\.0\.function was 'a:f' and is now 'b:g'"):
        third.notes.begin("score", dumped(third.config, "model", "sampling", "reward"))


def test_a_stage_is_compared_with_those_it_builds_on(tmp_path: Path) -> None:
    first, second = folder_at(tmp_path), folder_at(tmp_path, sampling={"temperature": 0.5})
    first.notes.begin("sample", dumped(first.config, "sampling"))
    with pytest.raises(BonbonError, match=r"sampling\.temperature was 1\.0 and is now 0\.5"):
        second.notes.begin("score", dumped(second.config, "sampling", "reward"))
    assert not (tmp_path / ".bonbon" / "score.json").exists()


def test_a_stage_is_finished_while_its_shards_are_there(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    folder.samples.mkdir()
    shards = [shard_path(folder.samples, index) for index in range(2)]
    assert not folder.notes.is_finished("sample", folder.samples)
    for shard in shards:
        shard.write_bytes(b"")
    assert not folder.notes.is_finished("sample", folder.samples)
    folder.notes.finish("sample", 2)
    assert folder.notes.is_finished("sample", folder.samples)
    shards[0].unlink()
    assert not folder.notes.is_finished("sample", folder.samples)


def test_a_broken_note_is_named(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    folder.notes.begin("sample", {"n": 1})
    (tmp_path / ".bonbon" / "sample.json").write_text('{"n": ')
    with pytest.raises(BonbonError, match=r"cannot read .*sample\.json"):
        folder.notes.begin("sample", {"n": 1})


# --- models and checkpoints -----------------------------------------------------------------------


def test_where_models_lie(tmp_path: Path) -> None:
    folder = folder_at(tmp_path, baselines={"dpo-1": {"objective": "dpo"}})
    assert folder.model("rank_regression") == tmp_path / "model"
    assert folder.model("dpo-1") == tmp_path / "baselines" / "dpo-1"
    assert folder.checkpoints("dpo-1") != folder.checkpoints("rank_regression")


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_are_removed(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    assert folder.last_checkpoint("rank_regression") is None
    for step, state in [(9, {}), (100, {}), (20, {}), (150, None), (200, '{"global_st')]:
        checkpoint = folder.checkpoints("rank_regression") / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        if state is not None:
            text = state if isinstance(state, str) else json.dumps(state)
            (checkpoint / "trainer_state.json").write_text(text)
    assert (
        folder.last_checkpoint("rank_regression")
        == folder.checkpoints("rank_regression") / "checkpoint-100"
    )
    left = sorted(path.name for path in folder.checkpoints("rank_regression").iterdir())
    assert left == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    for name, text in [("a", "x"), ("b", "x"), ("c", "y")]:
        (tmp_path / name).write_text(text)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(BonbonError, match=r"cannot read .*nowhere"):
        file_digest(tmp_path / "nowhere")
