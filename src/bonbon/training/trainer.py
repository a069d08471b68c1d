"""BoNBoN fine-tuning: `BoNBoNConfig` and `BoNBoNTrainer`, used the way TRL's trainers are.

    groups = read_groups("run/groups")
    trainer = BoNBoNTrainer("model", BoNBoNConfig("out"), train_dataset=groups)
    trainer.train()

The base model's log-probabilities are in the groups, so no reference model is held in memory. The
groups are not held there either: processes map them from a file (`bonbon.training.dataset_file`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.groups.provenance import check_independent, drawn_with
from bonbon.models.group_logprobs import (
    GroupRows,
    group_log_probs,
    sharing_pays,
    supports_shared_prompt,
)
from bonbon.objectives.catalogue import OBJECTIVES, GroupLogps, ObjectiveSettings
from bonbon.system.errors import BonbonError, DivergedError
from bonbon.system.processes import process_count
from bonbon.tilt.catalogue import TILTS
from bonbon.training.arguments import BoNBoNConfig as BoNBoNConfig
from bonbon.training.arguments import target_n
from bonbon.training.batches import (
    GroupBatches,
    GroupCollator,
    GroupLoader,
    PartsDataset,
    Processes,
    default_batch_tokens,
)
from bonbon.training.dataset import check_logprobs, common_n, select_groups, temperature_of
from bonbon.training.dataset_file import SelectedGroups
from bonbon.training.kl_budget import KLBudgetCallback, kl_meter
from bonbon.training.metrics import MetricSums
from bonbon.training.policy import load_model, prepare_model
from bonbon.training.reference_logprobs import ReferenceLogprobs, wants_recomputing

# Forked data loader workers share the mapped groups; others would get copies.
_WORKERS = "fork" if sys.platform == "linux" else None


class BoNBoNTrainer(Trainer):
    """Fine-tunes a policy towards best-of-n from scored groups.

    Args:
        model: a causal language model, or the name of one.
        args: the settings; see `BoNBoNConfig`.
        train_dataset: groups, as `bonbon.read_groups` returns them; `bonbon.open_groups` for more
            than fit in memory; any other iterable of `Group`s; or a `datasets.Dataset` of their
            rows. Groups whose rewards all tie carry no preference: they are left out, and counted
            in `self.selection.tied`.
        eval_dataset: held-out groups for the evaluation loss (and early stopping).
        processing_class: the model's tokenizer (for the padding token, and saved with the model).
        peft_config: train an adapter instead of all weights.

    The other arguments are those of `transformers.Trainer`. Raises BonbonError for groups that
    cannot be trained on; `train` raises it when the loss is no longer finite.

    Attributes:
        selection: what the objective uses of `train_dataset`, or None.
        held_out: the same of `eval_dataset`.
        drawn: the completions of each group before the objective selects from them.
        n: the n that the objective aims at.
        tilt: the name of the tilt that it aims at.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: BoNBoNConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or BoNBoNConfig("bonbon-trainer")
        _check_processes(args)
        model, processing_class = load_model(model, processing_class)
        model = prepare_model(model, args, peft_config)
        self._read_groups(args, train_dataset, eval_dataset)
        self._shares = supports_shared_prompt(model)
        self._quantized = bool(getattr(model, "is_quantized", False))
        self._check_model_settings(args)
        if args.kl_budget is not None:
            budget = self._kl_budget(args, model, processing_class, drawn_with(train_dataset))
            callbacks = [*(callbacks or []), budget]
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(getattr(processing_class, "pad_token_id", None) or 0),
            train_dataset=self.selection,
            eval_dataset=self.held_out,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self._check_parallelism()
        self._reference = self._reference_logprobs(getattr(train_dataset, "provenance", {}))
        # The loss is a plain mean over groups, so gradient accumulation divides by its steps.
        self.model_accepts_loss_kwargs = False
        self._settings = ObjectiveSettings(
            n=self.drawn or 0,
            tilt=TILTS[self.tilt](self.n or 1),
            alpha=args.alpha,
            beta=args.beta,
            delta=args.delta,
        )
        self._metrics = MetricSums()

    def _read_groups(self, args: BoNBoNConfig, train_dataset: Any, eval_dataset: Any) -> None:
        """Select what the objective uses of the data sets, and work out the n and the tilt."""
        self.objective = OBJECTIVES[args.objective]
        for dataset in (train_dataset, eval_dataset):
            check_independent(getattr(dataset, "provenance", {}), "train on")
        if isinstance(eval_dataset, Mapping):
            raise BonbonError("eval_dataset is one data set of groups and not several by name")
        self.temperature = temperature_of(args, train_dataset)
        self.max_batch_tokens = args.max_batch_tokens or default_batch_tokens(args.device)
        folder = Path(str(args.output_dir))
        self.selection = select_groups(train_dataset, self.objective.select, folder)
        self.held_out = select_groups(eval_dataset, self.objective.select, folder)
        self.drawn = common_n(self.selection, self.held_out)
        self.n = target_n(args, self.drawn)
        self.tilt = args.tilt or self.objective.tilt

    def _check_model_settings(self, args: BoNBoNConfig) -> None:
        """Raise BonbonError for settings that the model cannot be trained with."""
        if args.share_prompt and not self._shares:
            raise BonbonError(
                "share_prompt needs a model with position ids and attention layers alone, without "
                "gradient checkpointing; set share_prompt to false"
            )
        if args.kl_budget is not None and self._quantized:
            raise BonbonError(
                "kl_budget would measure from the quantised weights and not from the base model; "
                "leave one of the two out"
            )

    def _kl_budget(
        self,
        args: BoNBoNConfig,
        model: Any,
        tokenizer: Tokenizer | None,
        drawn: Mapping[str, Any],
    ) -> KLBudgetCallback:
        groups = self.held_out or self.selection
        if tokenizer is None or groups is None:
            raise BonbonError("kl_budget draws completions; give a processing_class and groups")
        assert args.kl_budget is not None
        meter = kl_meter(model, tokenizer, groups, args, self.temperature, drawn)
        return KLBudgetCallback(meter, args.kl_budget, model)

    def _check_parallelism(self) -> None:
        """Raise BonbonError for processes that share the work in a way that is not supported."""
        if self._quantized and self._shards_weights:
            raise BonbonError(
                "FSDP and DeepSpeed cannot share out quantised weights here; train on several GPUs "
                "without them, or leave train.lora.quantization out"
            )
        if self.args.kl_budget is not None and self._shards_weights:
            raise BonbonError("kl_budget needs each process to hold whole weights; leave it out")
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise BonbonError(
                "tensor, context and sequence parallelism are not supported; let all processes be "
                "data-parallel"
            )

    def _reference_logprobs(self, provenance: Mapping[str, Any]) -> ReferenceLogprobs | None:
        """Add the callback that recomputes the base model's log-probabilities, where it is needed.

        Raises BonbonError where those in the groups are to be used but are not known.
        """
        if not self.objective.compares:
            return None
        wanted = self.args.logprobs or ("recompute" if self._quantized else None)
        if not wants_recomputing(wanted, provenance):
            check_logprobs(self.selection, self.held_out)
            return None
        data_sets = {"train": self.selection, "eval": self.held_out}
        reference = ReferenceLogprobs(
            {name: groups for name, groups in data_sets.items() if groups is not None},
            self.logprobs_of,
        )
        self.add_callback(reference)
        return reference

    @property
    def _shards_weights(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def group_logps(self, model: nn.Module, part: Mapping[str, torch.Tensor]) -> GroupLogps:
        """Compute the summed log-probabilities of a collated part's completions."""
        rows = GroupRows(**{name: part[name] for name in GroupRows.__dataclass_fields__})
        asked = self.args.share_prompt
        share = self._shares and (sharing_pays(rows) if asked is None else asked)
        # Sharded weights are gathered again for the gradient of a layer's output, not of its cache;
        # and the trainer turns on gradient checkpointing only once it has been built.
        share = share and not self._shards_weights
        share = share and supports_shared_prompt(model)
        logps = group_log_probs(model, rows, self.temperature, share)
        return GroupLogps(logps, part["ref_logps"], part["rewards"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the objective's mean over a batch's groups; of one part, its share of that mean.

        With `return_outputs`, a batch's loss comes with a dict of outputs, which is empty.
        """
        if "parts" in inputs:
            losses = [self.compute_loss(model, part) for part in inputs["parts"]]
            loss = torch.stack(losses).sum()
            return (loss, {}) if return_outputs else loss
        logps = self.group_logps(model, inputs)
        mode = "train" if model.training else "eval"
        self._metrics.add(mode, logps, counts=bool(inputs["share"] > 0))
        loss = self.objective.loss(logps, self._settings).mean()
        return loss * inputs["share"].to(loss.dtype)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Do one forward and backward pass a part, so that one part's activations are held."""
        *parts, last = inputs["parts"]
        loss = 0.0
        for part in parts:
            with self._before_the_last_part(model):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        return loss + super().training_step(model, last, *args, **kwargs)

    @contextmanager
    def _before_the_last_part(self, model: nn.Module) -> Iterator[None]:
        """Leave out what is done once a batch: adding up gradients over processes, and the step."""
        if self.is_fsdp_enabled:  # reduces the gradients of each part, or it would hold them whole
            yield
        elif self.is_deepspeed_enabled:  # accelerate lets it step whenever gradients are in sync
            state = self.accelerator.gradient_state
            was = state.sync_gradients
            state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(was)
        else:
            with self.accelerator.no_sync(model):
                yield

    @torch.no_grad()
    def logprobs_of(self, groups: SelectedGroups) -> torch.Tensor:
        """Return ln π of every group's completions under the model as it is, (G, m), nats.

        The result is float64, on the CPU. Each process computes its share of the groups, and
        every process gets the whole result.
        """
        args, model = self.args, self.model_wrapped
        batches = GroupBatches(
            groups.shapes,
            args.eval_batch_size * args.world_size,
            self.max_batch_tokens,
            processes=Processes(args.world_size, args.process_index),
        )
        shape = groups.ref_logps.shape
        logprobs = torch.zeros(shape, dtype=torch.float64, device=args.device)
        was_training = model.training
        model.eval()
        for parts in batches:
            batch = self.data_collator(
                [([groups[index] for index in part.indices], part.share) for part in parts]
            )
            for part, tensors in zip(parts, self._prepare_inputs(batch)["parts"], strict=True):
                with self.compute_loss_context_manager():
                    logps = self.group_logps(model, tensors).logps
                if part.share > 0:  # or it is another process' group
                    logprobs[list(part.indices)] = logps.double()
        model.train(was_training)
        if args.world_size > 1:
            logprobs = self.accelerator.reduce(logprobs, "sum")
        return logprobs.cpu()

    # --- batches ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> GroupLoader:
        """Return the loader of this process' share of every batch.

        The batches are the same for any number of processes. Raises ValueError without a
        train_dataset.
        """
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        each = self._train_batch_size * args.world_size
        return self._loader(
            self.train_dataset,
            args.global_batch_size or each,
            window=args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> GroupLoader:
        """Return the loader of this process' share of the held-out groups, or of other groups.

        Raises ValueError where there are none, and BonbonError for groups that cannot be evaluated.
        """
        groups = self.eval_dataset if eval_dataset is None else eval_dataset
        if groups is None:
            raise ValueError("evaluation needs an eval_dataset")
        if not isinstance(groups, SelectedGroups):
            groups = self._select_others(groups)
        # All in one window, so that the mean of the batches' losses is the mean over the groups.
        size = self.args.eval_batch_size * self.args.world_size
        return self._loader(groups, size, window=len(groups))

    def _select_others(self, dataset: Any) -> SelectedGroups:
        """Select what the objective uses of groups that the trainer was not made with."""
        if self._reference is not None:
            raise BonbonError(
                "with logprobs: recompute only the eval_dataset that the trainer was made with can "
                "be evaluated, since the model is no longer the base model; pass the groups there"
            )
        check_independent(getattr(dataset, "provenance", {}), "evaluate on")
        groups = select_groups(dataset, self.objective.select, Path(str(self.args.output_dir)))
        assert groups is not None
        common_n(self.selection or self.held_out, groups)
        if self.objective.compares:
            check_logprobs(groups)
        return groups

    def _loader(self, groups: SelectedGroups, batch_size: int, **settings: Any) -> GroupLoader:
        args = self.args
        batches = GroupBatches(
            groups.shapes,
            batch_size,
            self.max_batch_tokens,
            processes=Processes(args.world_size, args.process_index),
            **settings,
        )
        # Not prepared by accelerate, which would divide the batches among processes once more.
        return GroupLoader(
            PartsDataset(groups),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            multiprocessing_context=_WORKERS if args.dataloader_num_workers else None,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # --- evaluation, logging, checkpoints ---------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the loss and the metrics on held-out groups, as `Trainer.evaluate` does."""
        if self._reference is not None:
            self._reference.compute()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise BonbonError: there are no predictions."""
        raise BonbonError("groups have no labels to predict; use evaluate, or bonbon.generate")

    def _prepare_input(self, data: Any) -> Any:
        """Move data to the device in its own dtype.

        DeepSpeed's 16 bits would round rewards and log-probabilities.
        """
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss on held-out groups; there are no labels to return."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, averaged over the groups since the last log."""
        mode, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        means = self._metrics.pop_means(mode, self._add_up)
        logs |= {f"{prefix}{name}": mean for name, mean in means.items()}
        super().log(logs, start_time)
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"the training diverged: {name} is {logs[name]} at step "
                    f"{self.state.global_step}; lower the learning rate"
                )

    def _add_up(self, values: list[float]) -> list[float]:
        """Add this process' values to those of the others."""
        if self.args.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        sums: list[float] = self.accelerator.reduce(tensor, "sum").tolist()
        return sums

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """Gather the weights that are divided among processes; None where each has all of them.

        All processes must call this; only the main one is sure to get all weights.
        """
        if not self._shards_weights:
            return None
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return weights

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state is written next, and last: a checkpoint that has it is whole.
        self.accelerator.wait_for_everyone()


def _check_processes(args: BoNBoNConfig) -> None:
    if process_count() != args.world_size:
        raise BonbonError(
            f"{process_count()} processes were started and each would train alone; set use_cpu "
            "(model.device: cpu), or give each an accelerator"
        )
