"""Rounds of sample, score and train: a best-of-a of a best-of-b is a best-of-ab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bonbon.config.run import RunConfig, parse_config, round_config
from bonbon.groups.shards import read_groups
from bonbon.objectives.ranks import rank_regression
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import evaluate as evaluate_stage
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.stages import score as score_stage
from bonbon.stages import train as train_stage
from bonbon.system.errors import BonbonError
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.discrete import best_of_n_pmf, kl_pmf, win_rate_pmf
from support.tabular import minimise


def length_reward(prompts: list[Any], completions: list[str]) -> list[float]:
    """Longer texts score more; ties broken by content."""
    return [len(text) + sum(map(ord, text)) % 997 / 1000 for text in completions]


# --- the law --------------------------------------------------------------------------------------


@given(st.integers(2, 30), st.floats(1, 5), st.floats(1, 5), st.integers(0, 2**31))
def test_best_of_a_of_best_of_b(outcomes: int, a: float, b: float, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(outcomes, 2.0))
    rewards = np.arange(outcomes) // 2  # with ties
    twice = best_of_n_pmf(best_of_n_pmf(p, rewards, b), rewards, a)
    np.testing.assert_allclose(twice, best_of_n_pmf(p, rewards, a * b), atol=1e-9)


def test_three_rounds_of_best_of_2_train_to_best_of_8() -> None:
    """Rank regression on 10,000 groups of 8 a round: within 0.01 in win rate, 0.03 nats in KL."""
    p = np.random.default_rng(0).dirichlet(np.full(60, 5.0))
    rewards = np.arange(len(p), dtype=np.float64)
    policy = p
    for round_ in range(3):
        drawn = np.random.default_rng(round_).choice(len(p), size=(10_000, 8), p=policy)
        at, base = torch.tensor(drawn), torch.tensor(np.log(policy))

        def loss(
            log_probs: torch.Tensor, at: torch.Tensor = at, base: torch.Tensor = base
        ) -> torch.Tensor:
            return rank_regression(log_probs[at], base[at], at.double(), BestOfN(2)).mean()

        policy = minimise(loss, start=policy)
    target = best_of_n_pmf(p, rewards, 8)
    assert win_rate_pmf(policy, p, rewards) == pytest.approx(
        win_rate_pmf(target, p, rewards), abs=0.01
    )
    assert kl_pmf(policy, p) == pytest.approx(kl_pmf(target, p), abs=0.03)


# --- the configuration ----------------------------------------------------------------------------


def settings(model: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {"name": str(model), "device": "cpu"},
        "prompts": {"path": str(prompts)},
        "sampling": {"n": 3, "max_new_tokens": 6, "shard_size": 8},
        "reward": {"function": "test_rounds:length_reward"},
        "rounds": 2,
        "train": {"objective": "rank_regression", "learning_rate": 1e-3, "n": 4, "batch_size": 4},
        "baselines": {"sft": {"objective": "sft_bon", "learning_rate": 1e-3}},
        "evaluation": {"holdout": 0.25, "k": 2, "bootstrap": 100},
    }
    return values | changes


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"prompt {index}\n" for index in range(24)))
    return path


def test_each_round_aims_at_the_root_of_n(tiny_model: Path, prompts: Path) -> None:
    def root(n: float | None, rounds: int) -> float | None:
        train = {"objective": "rank_regression", "n": n}
        config = parse_config(settings(tiny_model, prompts, rounds=rounds, train=train))
        return round_config(config, 2, "elsewhere").train.n

    assert root(8, 3) == 2  # exactly, though 8 ** (1 / 3) is 2.0000000000000004 or less
    assert root(10, 2) == pytest.approx(10**0.5)
    assert root(None, 2) == pytest.approx(3**0.5)  # as many as are drawn
    config = parse_config(settings(tiny_model, prompts))
    first, second = (round_config(config, number, "base") for number in (1, 2))
    assert (first.rounds, first.model.name, list(first.baselines)) == (1, "base", ["sft"])
    assert not second.baselines
    assert second.sampling.seed != first.sampling.seed


def test_rounds_compose_for_best_of_n_alone(tiny_model: Path, prompts: Path) -> None:
    """Three optimal tilts of win rate 2/3 one after another win 0.894 at 1.298 nats, not 8/9."""
    train: dict[str, Any] = {"objective": "rank_regression", "n": 4}
    config = parse_config(settings(tiny_model, prompts, train=train))
    assert round_config(config, 1, "base").train.tilt == "best_of_n"
    with pytest.raises(BonbonError, match="not for the optimal tilt"):
        parse_config(settings(tiny_model, prompts, train=train | {"tilt": "optimal"}))


def test_rounds_with_an_adapter_need_whole_weights(tiny_model: Path, prompts: Path) -> None:
    train = {"objective": "rank_regression", "n": 4, "lora": {"r": 2}}
    with pytest.raises(BonbonError, match=r"train\.lora\.merge"):
        parse_config(settings(tiny_model, prompts, train=train))
    train["lora"] = {"r": 2, "merge": True}
    parse_config(settings(tiny_model, prompts, train=train))


# --- the run --------------------------------------------------------------------------------------


def run(config: RunConfig, out: Path) -> RunFolder:
    folder = RunFolder(out, config)
    with folder.locked():
        run_stage.run(folder)
    return folder


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    config = parse_config(settings(tiny_model, prompts))
    return run(config, tmp_path_factory.mktemp("rounds") / "out")


def test_a_round_starts_from_the_last_one_s_model(finished: RunFolder) -> None:
    drawn_from = [
        read_groups(finished.path / f"round-{number}" / "groups").provenance["model"]
        for number in (1, 2)
    ]
    assert drawn_from[0] == finished.config.model.name
    assert drawn_from[1] == str(finished.path / "round-1" / "model")
    aimed = [
        json.loads((finished.path / f"round-{number}" / "model" / "training_log.json").read_text())
        for number in (1, 2)
    ]
    assert [record["n"] for record in aimed] == [2, 2]


def test_the_models_are_measured_against_the_first_base(finished: RunFolder) -> None:
    results = json.loads((finished.evaluation / "evaluation.json").read_text())
    assert results["base_model"] == finished.config.model.name
    assert results["n"] == 4
    assert list(results["models"]) == ["base", "best-of-4", "sft", "rank_regression"]
    assert results["models"]["rank_regression"]["kl"]["value"] > 0
    last = (finished.path / "round-2" / "model" / "model.safetensors").read_bytes()
    assert (finished.path / "model" / "model.safetensors").read_bytes() == last
    assert "best-of-4" in (finished.path / "model" / "README.md").read_text()


def test_finished_rounds_are_not_done_again(finished: RunFolder) -> None:
    def stamps() -> dict[str, int]:
        return {
            str(path): path.stat().st_mtime_ns
            for path in finished.path.rglob("*")
            if path.suffix in (".safetensors", ".parquet")
        }

    before = stamps()
    run(finished.config, finished.path)
    assert stamps() == before


def test_a_stop_between_rounds_is_gone_on_with(
    tiny_model: Path, prompts: Path, finished: RunFolder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = parse_config(settings(tiny_model, prompts))
    score, calls = score_stage.score, []

    def stopped(folder: RunFolder) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        score(folder)

    monkeypatch.setattr(run_stage, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "out")
    monkeypatch.undo()
    folder = run(config, tmp_path / "out")
    first, second = (
        [group.token_ids for group in read_groups(path / "round-2" / "groups")]
        for path in (finished.path, folder.path)
    )
    assert first == second


def test_other_rounds_in_the_same_folder_are_refused(finished: RunFolder) -> None:
    config = finished.config.model_copy(update={"rounds": 3})
    with pytest.raises(BonbonError, match="rounds was 2 and is now 3"):
        run(config, finished.path)


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1)])
def test_a_folder_keeps_its_number_of_rounds(
    tiny_model: Path, prompts: Path, tmp_path: Path, was: int, now: int
) -> None:
    """Or new rounds would be trained and the old model be evaluated as theirs."""

    def config(rounds: int) -> RunConfig:
        return parse_config(settings(tiny_model, prompts, rounds=rounds, baselines={}))

    folder = RunFolder(tmp_path / "out", config(was))
    if was == 1:
        sample_stage.sample(folder)
    else:
        run_stage._run_rounds(folder)
    with pytest.raises(BonbonError, match=f"rounds was {was} and is now {now}"):
        run(config(now), folder.path)


def test_a_training_that_came_to_nothing_can_be_changed(
    tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    """On the samples of the first round; once a model is there, no more."""
    values = settings(tiny_model, prompts, baselines={})

    def rounds_with(**train: Any) -> RunFolder:
        changed = values | {"train": values["train"] | train}
        return RunFolder(tmp_path / "out", parse_config(changed))

    with pytest.raises(BonbonError, match="adapter does not fit"):
        run_stage._run_rounds(rounds_with(lora={"target_modules": ["none_such"], "merge": True}))
    drawn = (tmp_path / "out" / "round-1" / "samples" / "shard-00000.parquet").stat().st_mtime_ns
    folder = rounds_with()
    run_stage._run_rounds(folder)
    assert folder.model(folder.config.model_name).is_dir()
    assert drawn == (folder.rounds()[0].samples / "shard-00000.parquet").stat().st_mtime_ns
    with pytest.raises(BonbonError, match=r"learning_rate was 0\.001 and is now 0\.5"):
        run_stage._run_rounds(rounds_with(learning_rate=0.5))


def test_other_training_settings_are_not_evaluated(finished: RunFolder) -> None:
    train = finished.config.train.model_copy(update={"learning_rate": 0.5})
    folder = RunFolder(finished.path, finished.config.model_copy(update={"train": train}))
    with pytest.raises(BonbonError, match=r"learning_rate was 0\.001 and is now 0\.5"):
        evaluate_stage.evaluate(folder)


def test_a_budget_for_all_rounds_is_not_one_for_each(tiny_model: Path, prompts: Path) -> None:
    train = {"objective": "rank_regression", "n": 4, "kl_budget": 1.0}
    with pytest.raises(BonbonError, match="for each of the rounds"):
        parse_config(settings(tiny_model, prompts, train=train))


@pytest.mark.parametrize("stage", ["sample", "score", "train"])
def test_single_stages_are_refused(finished: RunFolder, stage: str) -> None:
    stages = {
        "sample": sample_stage.sample,
        "score": score_stage.score,
        "train": train_stage.train,
    }
    with pytest.raises(BonbonError, match="use `bonbon run`"):
        stages[stage](finished)


def test_objectives_tied_to_the_draws_are_found_before_sampling(
    tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    train = {"objective": "bonbon", "n": 16}
    config = parse_config(settings(tiny_model, prompts, train=train, baselines={}))
    with pytest.raises(BonbonError, match="aims at the best of the n drawn"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "round-1" / "samples").exists()


def test_merged_adapters_go_through_rounds(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    train = {"objective": "rank_regression", "n": 4, "lora": {"r": 2, "merge": True}}
    config = parse_config(settings(tiny_model, prompts, train=train, baselines={}))
    folder = run(config, tmp_path / "out")
    assert (folder.path / "model" / "model.safetensors").exists()
    assert not (folder.path / "model" / "adapter_config.json").exists()
