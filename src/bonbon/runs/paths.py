"""The layout of a run: where its parts lie."""

from __future__ import annotations

from pathlib import Path

from bonbon.config.run import RunConfig
from bonbon.system.storage import is_remote, storage_path


class RunPaths:
    """The layout of a run's folder.

    `prompts/`, `samples/` and `groups/` hold the prompts, the drawn and the scored groups; they may
    lie in a store (`storage`) instead. `model/` and `baselines/NAME/` hold the trained models,
    `evaluation/` the evaluation, `.bonbon/` notes and training checkpoints.

    Raises BonbonError for a store that cannot be used.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.data = path if config.storage is None else storage_path(config.storage)
        self.prompts = self.data / "prompts"
        self.samples = self.data / "samples"
        self.groups = self.data / "groups"
        self.evaluation = path / "evaluation"
        self._has_store = config.storage is not None
        self._main = config.model_name

    @property
    def storage(self) -> str | None:
        """The store, as notes name it; None where samples and groups lie in the run's folder."""
        if not self._has_store:
            return None
        return str(self.data if is_remote(self.data) else self.data.absolute())

    def model(self, name: str) -> Path:
        """Return where the model of that name is put."""
        if name == self._main:
            return self.path / "model"
        return self.path / "baselines" / name

    def training(self, name: str) -> str:
        """The stage that trains the model of that name, called after where it is put."""
        return "train" if name == self._main else f"train-baseline-{name}"

    def checkpoints(self, name: str) -> Path:
        """Return where the checkpoints of a training lie until it is done."""
        return self.path / ".bonbon" / f"{self.training(name)}-checkpoints"
