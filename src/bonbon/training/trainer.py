"""BoNBoN fine-tuning: `BoNBoNConfig` and `BoNBoNTrainer`, used the way TRL's trainers are.

    groups = read_groups("run/groups")
    trainer = BoNBoNTrainer("model", BoNBoNConfig("out"), train_dataset=groups)
    trainer.train()

The base model's log-probabilities are in the groups, so no reference model is held in memory. Nor
are the groups, which processes map from a file (`bonbon.training.dataset_file`).
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.prompts import EncodedPrompt
from bonbon.groups.provenance import check_independent, drawn_with
from bonbon.models.group_logprobs import (
    GroupRows,
    group_log_probs,
    supports_shared_prompt,
)
from bonbon.models.loading import load_policy
from bonbon.objectives.catalogue import OBJECTIVES, GroupLogps, ObjectiveSettings, group_metrics
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
)
from bonbon.training.dataset import Selection, check_logprobs, common_n, selected, temperature_of
from bonbon.training.dataset_file import SelectedGroups
from bonbon.training.kl_budget import KLBudgetCallback, KLMeter, base_of
from bonbon.training.reference_logprobs import ReferenceLogprobs, wants_recomputing

# Forked data loader workers share the mapped groups; others would get copies.
_WORKERS = "fork" if sys.platform == "linux" else None


class BoNBoNTrainer(Trainer):
    """Fine-tunes a policy towards best-of-n from scored groups.

    Args:
        model: a causal language model, or the name of one.
        args: the settings; see `BoNBoNConfig`.
        train_dataset: groups: those of `bonbon.read_groups` or (of any number, as they are read one
            by one) `bonbon.open_groups`, other `Group`s that can be iterated over, or a
            `datasets.Dataset` of their rows. Groups whose rewards all tie carry no preference: they
            are dropped, and counted in `self.selection.tied`.
        eval_dataset: held-out groups for the evaluation loss (and early stopping).
        processing_class: the model's tokenizer (for the padding token, and saved with the model).
        peft_config: train an adapter instead of all weights.

    The other arguments are those of `transformers.Trainer`. Raises BonbonError for groups that
    cannot be trained on, and `train` when the loss is no longer finite.
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
        if process_count() != args.world_size:
            raise BonbonError(
                f"{process_count()} processes were started and each would train alone; set use_cpu "
                "(model.device: cpu), or give each an accelerator"
            )
        if isinstance(model, str):
            model, tokenizer = load_policy(model, dtype="float32", device="cpu")
            processing_class = processing_class or tokenizer
        elif processing_class is None and (name := str(getattr(model, "name_or_path", "") or "")):
            processing_class = AutoTokenizer.from_pretrained(name)
        if args.ddp_find_unused_parameters is None and not _has_experts(model):
            args.ddp_find_unused_parameters = False  # a search through the graph at every step
        if not isinstance(model, PeftModel):  # an adapter's own dropout was asked for
            _disable_dropout(model)
        quantized = getattr(model, "is_quantized", False)
        if quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if peft_config is not None:
            set_seed(args.seed)  # or each process would start from an adapter of its own
            try:
                model = get_peft_model(model, peft_config)
            except ValueError as error:
                raise BonbonError(f"this adapter does not fit the model: {error}") from error
        if args.gradient_checkpointing and isinstance(model, PreTrainedModel | PeftModel):
            model.enable_input_require_grads()
        self.objective = OBJECTIVES[args.objective]
        for dataset in (train_dataset, eval_dataset):
            check_independent(getattr(dataset, "provenance", {}), "train on")
        if isinstance(eval_dataset, Mapping):
            raise BonbonError("eval_dataset is one data set of groups and not several by name")
        self.temperature = temperature_of(args, train_dataset)
        self.max_batch_tokens = args.max_batch_tokens or _pass_tokens(args)
        folder = Path(str(args.output_dir))
        self.selection = selected(train_dataset, self.objective.select, folder)
        self.held_out = selected(eval_dataset, self.objective.select, folder)
        self.drawn = common_n(self.selection, self.held_out)
        self.n = target_n(args, self.drawn)
        self.tilt = args.tilt or self.objective.tilt
        self._shares = supports_shared_prompt(model)
        if args.share_prompt and not self._shares:
            raise BonbonError(
                "share_prompt needs a model with position ids and attention layers alone, without "
                "gradient checkpointing; set share_prompt to false"
            )
        if args.kl_budget is not None and quantized:
            raise BonbonError(
                "kl_budget would measure from the quantised weights and not from the base model; "
                "leave one of the two out"
            )
        if args.kl_budget is not None:
            chosen = self.held_out or self.selection
            meter = self._kl_meter(model, processing_class, args, chosen, drawn_with(train_dataset))
            callbacks = [
                *(callbacks or []),
                KLBudgetCallback(meter, args.kl_budget, model),
            ]
        pad_id = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(pad_id or 0),
            train_dataset=self.selection.groups if self.selection else None,
            eval_dataset=self.held_out.groups if self.held_out else None,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        if quantized and self._shards_weights:
            raise BonbonError(
                "FSDP and DeepSpeed cannot share out quantised weights here; train on several GPUs "
                "without them, or leave train.lora.quantization out"
            )
        if args.kl_budget is not None and self._shards_weights:
            raise BonbonError("kl_budget needs each process to hold whole weights; leave it out")
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise BonbonError(
                "tensor, context and sequence parallelism are not supported; let all processes be "
                "data-parallel"
            )
        asked = args.logprobs or ("recompute" if quantized else None)
        self._reference: ReferenceLogprobs | None = None
        if self.objective.compares:  # others do without
            if wants_recomputing(asked, getattr(train_dataset, "provenance", {})):
                self._reference = ReferenceLogprobs(self._data_sets(), self.logprobs_of)
                self.add_callback(self._reference)
            else:
                check_logprobs(self.selection, self.held_out)
        # The loss is a plain mean over groups, so gradient accumulation divides by its steps.
        self.model_accepts_loss_kwargs = False
        self._settings = ObjectiveSettings(
            n=self.drawn or 0,
            tilt=TILTS[self.tilt](self.n or 1),
            alpha=args.alpha,
            beta=args.beta,
            delta=args.delta,
        )
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @property
    def _shards_weights(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _kl_meter(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        args: BoNBoNConfig,
        chosen: Selection | None,
        drawn: Mapping[str, Any],
    ) -> KLMeter:
        if tokenizer is None or chosen is None:
            raise BonbonError("kl_budget draws completions; give a processing_class and groups")
        longest = int(chosen.groups.shapes[:, 2].max())
        step = max(1, len(chosen.groups) // args.kl_prompts)
        prompts = [
            EncodedPrompt(group.prompt_id, "", group.prompt_token_ids)
            for group in chosen.groups[::step][: args.kl_prompts]
        ]
        config = SamplingConfig(
            n=args.kl_samples,
            max_new_tokens=drawn.get("max_new_tokens", longest),
            temperature=self.temperature,
            top_k=drawn.get("top_k", 0),
            top_p=drawn.get("top_p", 1.0),
            seed=args.seed,
        )
        return KLMeter(base_of(model), tokenizer, prompts, config)

    def group_logps(self, model: nn.Module, part: Mapping[str, torch.Tensor]) -> GroupLogps:
        """The summed log-probabilities of a collated part's completions."""
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
        """The objective's mean over a batch's groups, or its `share` of the mean for one part."""
        if "parts" in inputs:
            losses = [self.compute_loss(model, part) for part in inputs["parts"]]
            loss = torch.stack(losses).sum()
            return (loss, {}) if return_outputs else loss
        logps = self.group_logps(model, inputs)
        self._count("train" if model.training else "eval", logps, bool(inputs["share"] > 0))
        loss = self.objective.loss(logps, self._settings).mean()
        return loss * inputs["share"].to(loss.dtype)

    @torch.no_grad()
    def _count(self, mode: str, logps: GroupLogps, counts: bool) -> None:
        """Add to the metrics' sums, in which every process has the same names in the same order."""
        sums = self._sums[mode]
        sums["groups"] += len(logps.rewards) * counts
        for name, values in group_metrics(logps).items():
            sums[name] += float(values.double().sum()) * counts

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass a part: never more than a part's activations are held."""
        *parts, last = inputs["parts"]
        loss = 0.0
        for part in parts:
            with self._before_the_last_part(model):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        return loss + super().training_step(model, last, *args, **kwargs)

    @contextmanager
    def _before_the_last_part(self, model: nn.Module) -> Iterator[None]:
        if self.is_fsdp_enabled:  # reduces the gradients of each part, or it would hold them whole
            yield
        elif self.is_deepspeed_enabled:  # accelerate has it step wherever gradients are in step
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

        Each process computes its share of the groups; all get all of them. float64.
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

    def _data_sets(self) -> dict[str, SelectedGroups]:
        data_sets = {"train": self.train_dataset, "eval": self.eval_dataset}
        return {name: groups for name, groups in data_sets.items() if groups is not None}

    # --- batches ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> GroupLoader:
        """This process' share of every batch; the batches are the same whatever the processes."""
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
        """This process' share of the held-out groups, or of others. Raises as the trainer does."""
        groups = self.eval_dataset if eval_dataset is None else eval_dataset
        if groups is None:
            raise ValueError("evaluation needs an eval_dataset")
        if not isinstance(groups, SelectedGroups):
            groups = self._others(groups)
        # All in one window, so that the mean of the batches' losses is that of the groups'.
        size = self.args.eval_batch_size * self.args.world_size
        return self._loader(groups, size, window=len(groups))

    def _others(self, dataset: Any) -> SelectedGroups:
        """What the objective selects of groups that the trainer was not made with."""
        if self._reference is not None:
            raise BonbonError(
                "with log-probabilities computed anew only the eval_dataset that the trainer was "
                "made with can be evaluated: the model is no longer the base model"
            )
        check_independent(getattr(dataset, "provenance", {}), "evaluate on")
        found = selected(dataset, self.objective.select, Path(str(self.args.output_dir)))
        assert found is not None
        common_n(self.selection or self.held_out, found)
        if self.objective.compares:
            check_logprobs(found)
        return found.groups

    def _loader(self, groups: SelectedGroups, batch_size: int, **settings: Any) -> GroupLoader:
        args = self.args
        batches = GroupBatches(
            groups.shapes,
            batch_size,
            self.max_batch_tokens,
            processes=Processes(args.world_size, args.process_index),
            **settings,
        )
        # Not prepared by accelerate, which would share the batches out once more.
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
        """The loss and the metrics on held-out groups, as `Trainer.evaluate` returns them."""
        if self._reference is not None:
            self._reference.compute()
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises BonbonError: there are no predictions."""
        raise BonbonError("groups have no labels to predict; use evaluate, or bonbon.generate")

    def _prepare_input(self, data: Any) -> Any:
        """To the device as it is: DeepSpeed's 16 bits would round rewards and log-probabilities."""
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
        """The loss on held-out groups; there are no labels to return."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, averaged over the groups since the last log."""
        evaluating = "eval_loss" in logs
        sums = self._sums.pop("eval" if evaluating else "train", {})
        prefix = "eval_" if evaluating else ""
        names, values = list(sums), list(sums.values())
        if self.args.world_size > 1 and values:
            tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
            values = self.accelerator.reduce(tensor, "sum").tolist()
        groups = values[0] if values else 0
        logs |= {f"{prefix}{name}": v / groups for name, v in zip(names, values, strict=True)}
        logs.pop(f"{prefix}groups", None)
        super().log(logs, start_time)
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"the training diverged: {name} is {logs[name]} at step "
                    f"{self.state.global_step}; lower the learning rate"
                )

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that the processes hold shares of; None where each holds them whole.

        All processes have to call this; only the main one is sure to get all weights.
        """
        if not self._shards_weights:
            return None
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return weights

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state is written next, and last, as a sign that a checkpoint is whole.
        self.accelerator.wait_for_everyone()


def _has_experts(model: nn.Module) -> bool:
    """Whether a step may leave some of the weights unused."""
    return any("expert" in name for name, _ in model.named_modules())


def _disable_dropout(model: nn.Module) -> None:
    """Without it the policy is the base model at the first step, as the objectives suppose."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):  # of functional dropout
                setattr(module, name, 0.0)


def _pass_tokens(args: BoNBoNConfig) -> int:
    """A CPU is fastest while a pass fits its caches; elsewhere memory is what counts."""
    return 4096 if args.device.type == "cpu" else 32_768


def sharing_pays(rows: GroupRows) -> bool:
    """Whether computing the prompt once is the faster way: where it saves a quarter of the tokens.

    So `benchmarks/training_step.py` has it, and about from there on it takes less memory too. A
    second, short forward pass has a price of its own.
    """
    _, m, width = rows.completion_ids.shape
    prompt = rows.prompt_ids.shape[1]
    return 4 * (m - 1) * prompt >= m * (prompt + width)
