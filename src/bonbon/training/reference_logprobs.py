"""The base model's log-probabilities, recomputed before the first step.

Those of another engine (vLLM, a server) differ from the trainer's by more than rounding: other
kernels, other dtypes, tokens of a probability close to 0. The objectives compare the policy with
its own start, so at the first step the two should be equal. Recomputing takes a forward pass over
the groups, divided among the processes as the batches are: about a third of an epoch's work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bonbon.system.errors import BonbonError
from bonbon.training.dataset_file import SelectedGroups

FILE = "reference_logps.safetensors"


def wants_recomputing(setting: str | None, provenance: Mapping[str, Any]) -> bool:
    """Return whether to recompute: the setting, or if it is None, whether another engine drew."""
    if setting is not None:
        return setting == "recompute"
    return provenance.get("sampler", "transformers") != "transformers"


class ReferenceLogprobs(TrainerCallback):
    """Puts the base model's log-probabilities into the groups before the first step.

    They are saved beside the checkpoints, since a resumed training no longer has the base model.

    Args:
        groups: the data sets by name, whose `ref_logps` are written.
        logprobs_of: computes the log-probabilities (G, m) of a data set's completions in nats,
            under the model as it is.
    """

    def __init__(
        self,
        groups: Mapping[str, SelectedGroups],
        logprobs_of: Callable[[SelectedGroups], torch.Tensor],
    ) -> None:
        self._groups = groups
        self._logprobs_of = logprobs_of
        self._known: dict[str, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        path = Path(str(args.output_dir)) / FILE
        if state.global_step > 0:
            self._put(_saved(path, self._groups))
            return
        known = self.compute()
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(known, path, metadata=_digests(self._groups))

    def compute(self) -> dict[str, torch.Tensor]:
        """Compute the log-probabilities once, from the model as it is at the first call.

        Later it is no longer the base model. Returns them by data set, each (G, m), nats.
        """
        if self._known is None:
            self._put({name: self._logprobs_of(data) for name, data in self._groups.items()})
        assert self._known is not None
        return self._known

    def _put(self, logps: dict[str, torch.Tensor]) -> None:
        for name, groups in self._groups.items():
            groups.ref_logps[:] = logps[name].numpy()
        self._known = logps


def _digests(datasets: Mapping[str, SelectedGroups]) -> dict[str, str]:
    return {name: groups.digest() for name, groups in datasets.items()}


def _saved(path: Path, datasets: Mapping[str, SelectedGroups]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            noted = file.metadata()
        logps: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BonbonError(
            f"cannot read {path}, the base model's log-probabilities that the checkpoint was "
            f"trained with ({error}); start the training again without the checkpoint"
        ) from error
    if noted != _digests(datasets):
        raise BonbonError(
            f"{path} belongs to other groups; start the training again without the checkpoint"
        )
    return logps
