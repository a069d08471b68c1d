"""A run that version 0.1.0 made can be shown, reported, compared and resumed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bonbon.__main__ import main

pytest.importorskip("vaderSentiment")  # the reward

OLDER = Path(__file__).parent / "before_the_move"
TOLERANCE = 1e-4  # the last digits of log-probabilities depend on the CPU

# Keys that have moved since; a run is the same under their new names.
MOVED = "  adam_beta2: 0.97\n  max_grad_norm: 5.0\n  share_prompt: false\n"
NOW = "  arguments: {adam_beta2: 0.97, max_grad_norm: 5.0, share_prompt: false}\n"

Command = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs and of what they were made from; the current folder."""
    copy = shutil.copytree(OLDER, tmp_path / "place")
    monkeypatch.chdir(copy)  # the older version noted relative paths
    older = (copy / "run.yaml").read_text()
    assert MOVED in older
    (copy / "older.yaml").write_text(older)
    (copy / "run.yaml").write_text(older.replace(MOVED, NOW))
    return copy


@pytest.fixture
def bonbon(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`bonbon("report", "run", status=0)` runs a command there and returns what it printed."""

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["bonbon", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.out if status == 0 else printed.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path; model cards, which are written again, are left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation" / "evaluation.json").read_text())


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists, with its path; costs in seconds are left out."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}")
    elif not path.endswith(".seconds"):
        yield path, values


def assert_same_figures(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """The figures of the older version are there with equal values; further ones may be there."""
    values, wanted = dict(leaves(found)), dict(leaves(expected))
    assert wanted
    assert wanted.keys() <= values.keys()
    close = {
        path: pytest.approx(value, rel=tolerance, abs=tolerance)
        if isinstance(value, float)
        else value
        for path, value in wanted.items()
    }
    differing = {
        path: (values[path], wanted[path]) for path in wanted if values[path] != close[path]
    }
    assert not differing


def test_a_finished_run_is_shown_and_nothing_is_made_again(place: Path, bonbon: Command) -> None:
    printed = bonbon("run", "run.yaml", "--out", "run")
    assert "rank_regression" in printed
    assert "run/report.html" in printed
    made = [path.name for path in OLDER.joinpath("run").iterdir() if path.is_dir()]
    assert {"prompts", "samples", "groups", "model", "baselines", "evaluation"} <= set(made)
    for name in ("prompts", "samples", "groups", "model", "baselines"):
        assert contents(place / "run" / name) == contents(OLDER / "run" / name)
    older = contents(OLDER / "run" / "evaluation")
    shards = {name for name in older if name.endswith(".parquet")}
    now = contents(place / "run" / "evaluation")
    assert len(shards) == 11
    assert {name for name in now if name.endswith(".parquet")} == shards
    draws = {name for name in shards if name.split("/")[0].endswith(("-prompts", "-samples"))}
    assert len(draws) == 6
    assert {name: now[name] for name in draws} == {name: older[name] for name in draws}
    assert_same_figures(evaluation(place / "run"), evaluation(OLDER / "run"), tolerance=1e-6)


def test_a_report_is_written(place: Path, bonbon: Command) -> None:
    printed = bonbon("report", "run")
    assert printed.strip() == "run/report.html"
    page = (place / "run" / "report.html").read_text()
    for name in ("base", "best-of-4", "pairs", "rank_regression"):
        assert name in page


def test_a_run_can_be_compared(place: Path, bonbon: Command) -> None:
    """A policy of the same name draws the same completions, so its figures are the run's."""
    bonbon("compare", "rank_regression=run", "base@best-of-2", "--out", "compared")
    found, expected = evaluation(place / "compared")["models"], evaluation(OLDER / "run")["models"]
    assert set(found) == {"base", "best-of-4", "rank_regression", "base-best-of-2"}
    for name in ("base", "best-of-4", "rank_regression"):
        for models in (found, expected):
            del models[name]["length_controlled_win_rate"]  # fitted to all policies at once
        assert_same_figures(found[name], expected[name])
    assert 0 < found["base-best-of-2"]["win_rate"]["value"] < 1


def test_a_stopped_run_resumes_from_its_samples(place: Path, bonbon: Command) -> None:
    bonbon("run", "run.yaml", "--out", "stopped")
    for name in ("prompts", "samples"):
        assert contents(place / "stopped" / name) == contents(OLDER / "stopped" / name)
    assert_same_figures(evaluation(place / "stopped"), evaluation(OLDER / "run"))


@pytest.mark.parametrize("run", ["run", "stopped"])
def test_a_changed_setting_is_refused(place: Path, bonbon: Command, run: str) -> None:
    before = contents(place / run)
    printed = bonbon("run", "run.yaml", "--out", run, "--set", "sampling.n=3", status=2)
    assert "sampling.n was 4 and is now 3" in printed
    after = contents(place / run)
    after.pop(".bonbon/lock")
    assert after == before


def test_moved_keys_are_refused_by_their_successors(place: Path, bonbon: Command) -> None:
    before = contents(place / "run")
    printed = bonbon("run", "older.yaml", "--out", "run", status=2)
    for name in ("adam_beta2", "max_grad_norm", "share_prompt"):
        assert f"train.{name} is now train.arguments.{name}" in printed
    assert contents(place / "run") == before


def test_a_moved_key_of_another_value_is_refused(place: Path, bonbon: Command) -> None:
    change = "train.arguments.adam_beta2=0.9"
    printed = bonbon("run", "run.yaml", "--out", "run", "--set", change, status=2)
    assert "train.arguments.adam_beta2 was 0.97 and is now 0.9" in printed
