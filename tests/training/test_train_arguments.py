"""How a run's configuration becomes the trainer's arguments, and what may be among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from bonbon.config.run import RunConfig, parse_config
from bonbon.objectives import catalogue
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import train as train_stage
from bonbon.stages.checks import check_config
from bonbon.stages.run import run, sample_and_score
from bonbon.stages.train import check_trainings
from bonbon.system.errors import BonbonError
from bonbon.training.from_config import training_arguments


def length(prompts: list[Any], completions: list[str]) -> list[float]:
    """A reward for the runs below."""
    return [float(len(completion)) for completion in completions]


def config_of(tmp_path: Path, model: Path | str = "m", **train: Any) -> RunConfig:
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"Once upon a {i}\n" for i in range(10)))
    return parse_config(
        {
            "model": {"name": str(model), "device": "cpu"},
            "prompts": {"path": str(prompts)},
            "sampling": {"n": 4, "max_new_tokens": 4},
            "reward": {"function": f"{__name__}:length"},
            "train": train,
            "evaluation": {"k": 2, "bootstrap": 100},
        }
    )


def arguments_of(tmp_path: Path, **train: Any) -> Any:
    folder = RunFolder(tmp_path / "run", config_of(tmp_path, **train))
    name = folder.config.model_name
    return training_arguments(folder.config, name, folder.checkpoints(name))


def test_settings_and_further_arguments_reach_the_trainer(tmp_path: Path) -> None:
    given = arguments_of(
        tmp_path,
        optimizer="sgd",
        epochs=3,
        kl_budget=0.5,
        arguments={"adam_beta1": 0.8, "delta": 2, "logging_steps": 3, "dataloader_num_workers": 0},
    )
    assert (given.optim, given.num_train_epochs, given.kl_budget) == ("sgd", 3, 0.5)
    assert (given.adam_beta1, given.delta, given.logging_steps) == (0.8, 2, 3)
    default = arguments_of(tmp_path)
    assert (default.adam_beta2, default.max_grad_norm, default.logging_steps) == (0.98, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"adam_beta": 0.9}, r"train\.arguments\.adam_beta: .* did you mean adam_beta"),
        ({"seed": 1}, r"train\.arguments\.seed cannot be set there; it is train\.seed"),
        ({"optim": "sgd"}, r"train\.arguments\.optim cannot be set there; it is train\.optimizer"),
        ({"epochs": 1}, r"train\.arguments\.epochs cannot be set there; it is train\.epochs"),
        ({"output_dir": "x"}, r"train\.arguments\.output_dir cannot be set: the run sets it"),
        ({"per_device_train_batch_size": 4}, "cannot be set: the run sets it"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be set: .* no labels"),
        ({"hub_strategy": "every_save"}, "hub_strategy cannot be set: the finished model"),
        ({"hub_token": "x"}, r"hub_token cannot be set: .* use `hf auth login`"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    config = config_of(tmp_path, arguments=arguments)
    with pytest.raises(BonbonError, match=said):
        check_config(config)


def test_an_unknown_logger_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    config = config_of(tmp_path, arguments={"report_to": "nowhere"})
    with pytest.raises(BonbonError, match="nowhere is not supported"):
        check_trainings(RunFolder(tmp_path / "run", config))


class Recorder(TrainerCallback):
    """Stands for an integration such as wandb."""

    entries: list[dict[str, float]] = []  # noqa: RUF012

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.entries.append(dict(logs))


def test_a_new_objective_trains_from_one_entry_and_is_reported(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def loss(group: catalogue.GroupLogps, settings: catalogue.ObjectiveSettings) -> Any:
        asked.append(settings.beta)
        return -group.logps[:, 0]

    monkeypatch.setitem(catalogue.OBJECTIVES, "mine", catalogue.Objective(loss))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "entries", [])
    config = config_of(
        tmp_path,
        tiny_model,
        objective="mine",
        beta=0.7,
        arguments={"report_to": "recorder", "logging_steps": 1, "max_steps": 1},
    )
    folder = RunFolder(tmp_path / "run", config)
    with folder.locked():
        run(folder)
    assert set(asked) == {0.7}
    assert (folder.model("mine") / "model.safetensors").exists()
    assert any("loss" in entry for entry in Recorder.entries)


class Hub:
    """Stands for the hub: holds what was uploaded, or cannot be reached."""

    uploads: list[tuple[str, set[str]]] = []  # noqa: RUF012
    is_down = False

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        if self.is_down:
            raise ConnectionError("no route to the hub")

    def upload_folder(self, repo_id: str, folder_path: Path, revision: str | None) -> None:
        self.uploads.append((repo_id, {path.name for path in folder_path.iterdir()}))


@pytest.mark.parametrize("is_down", [False, True])
def test_the_finished_model_is_uploaded_and_no_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_down: bool
) -> None:
    monkeypatch.setattr(train_stage, "HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    monkeypatch.setattr(Hub, "is_down", is_down)
    arguments = {"push_to_hub": True, "hub_model_id": "me/mine"}
    config = config_of(tmp_path, str(tiny_model), save_steps=1, arguments=arguments)
    assert not training_arguments(config, config.model_name, tmp_path).push_to_hub
    folder = RunFolder(tmp_path / "run", config)
    with folder.locked():
        sample_and_score(folder)
        if is_down:
            with pytest.raises(BonbonError, match=r"is trained .* no route .* `hf upload me/mine"):
                train_stage.train(folder)
        else:
            train_stage.train(folder)
    model = folder.model(config.model_name)
    assert (model / "model.safetensors").exists()
    files = {path.name for path in model.iterdir()}
    assert Hub.uploads == ([] if is_down else [("me/mine", files)])


def test_an_upload_needs_a_repository(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match="push_to_hub needs a hub_model_id"):
        config_of(tmp_path, arguments={"push_to_hub": True})
