"""The base model's log-probabilities, computed anew before the first step.

Another engine's (vLLM's, a server's) differ from the trainer's numerics by more than rounding:
other kernels, other dtypes, tokens of a probability close to 0. The objectives compare the policy
with its own start, so at the first step the two should be the same. It takes a forward pass over
the groups, shared out over the processes as the batches are: about a third of an epoch's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bonbon.errors import BonbonError
from bonbon.group_batches import GroupBatches, Processes
from bonbon.selected_groups import SelectedGroups

if TYPE_CHECKING:
    from bonbon.trainer import BoNBoNTrainer

FILE = "reference_logps.safetensors"


def wants_recomputing(asked: str | None, provenance: Mapping[str, Any]) -> bool:
    """Whether log-probabilities are computed anew: as asked, else where another engine drew."""
    if asked is not None:
        return asked == "recompute"
    return provenance.get("sampler", "transformers") != "transformers"


class ReferenceLogps(TrainerCallback):
    """Puts the base model's log-probabilities into the trainer's groups before the first step.

    They are kept beside the checkpoints, since a training that goes on has no base model any more.
    """

    def __init__(self, trainer: BoNBoNTrainer) -> None:
        self.trainer = trainer
        self._known: dict[str, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        path = Path(str(args.output_dir)) / FILE
        if state.global_step > 0:
            self._put(_kept(path, self._groups()))
            return
        known = self.compute()
        if self.trainer.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(known, path, metadata=_digests(self._groups()))

    def compute(self) -> dict[str, torch.Tensor]:
        """Compute them from the model as it is, once: later it is no longer the base model."""
        if self._known is None:
            self._put(
                {name: reference_logps(self.trainer, it) for name, it in self._groups().items()}
            )
        assert self._known is not None
        return self._known

    def _groups(self) -> dict[str, SelectedGroups]:
        found = {"train": self.trainer.train_dataset, "eval": self.trainer.eval_dataset}
        return {name: groups for name, groups in found.items() if groups is not None}

    def _put(self, logps: dict[str, torch.Tensor]) -> None:
        for name, groups in self._groups().items():
            groups.ref_logps[:] = logps[name].numpy()
        self._known = logps


def _digests(datasets: Mapping[str, SelectedGroups]) -> dict[str, str]:
    return {name: groups.digest() for name, groups in datasets.items()}


def _kept(path: Path, datasets: Mapping[str, SelectedGroups]) -> dict[str, torch.Tensor]:
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


@torch.no_grad()
def reference_logps(trainer: BoNBoNTrainer, groups: SelectedGroups) -> torch.Tensor:
    """ln π of every group's selected completions under the model as it is now, (G, m), nats.

    Each process computes its share of the groups; all get all of them. float64.
    """
    args, model = trainer.args, trainer.model_wrapped
    batches = GroupBatches(
        groups.shapes,
        args.eval_batch_size * args.world_size,
        trainer.max_batch_tokens,
        processes=Processes(args.world_size, args.process_index),
    )
    found = torch.zeros(groups.ref_logps.shape, dtype=torch.float64, device=args.device)
    was_training = model.training
    model.eval()
    for parts in batches:
        laid_out = trainer.data_collator(
            [([groups[index] for index in part.indices], part.share) for part in parts]
        )
        for part, tensors in zip(parts, trainer._prepare_inputs(laid_out)["parts"], strict=True):
            with trainer.compute_loss_context_manager():
                logps = trainer.group_logps(model, tensors).logps
            if part.share > 0:  # or it is another process' group
                found[list(part.indices)] = logps.double()
    model.train(was_training)
    if args.world_size > 1:
        found = trainer.accelerator.reduce(found, "sum")
    return found.cpu()
