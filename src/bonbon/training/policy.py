"""The policy before its first step: loaded, without dropout, and with its adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.models.loading import load_policy
from bonbon.system.errors import BonbonError
from bonbon.training.arguments import BoNBoNConfig


def load_model(
    model: PreTrainedModel | nn.Module | str, tokenizer: Tokenizer | None
) -> tuple[Any, Tokenizer | None]:
    """Load what is given by name: the model, and its tokenizer where none is given."""
    if isinstance(model, str):
        loaded, own_tokenizer = load_policy(model, dtype="float32", device="cpu")
        return loaded, tokenizer or own_tokenizer
    name = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None and name:
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model, tokenizer


def prepare_model(model: Any, args: BoNBoNConfig, peft_config: PeftConfig | None) -> Any:
    """Turn off dropout, add the adapter, and set what gradients need in the model and in `args`.

    Raises BonbonError for an adapter that does not fit the model.
    """
    if args.ddp_find_unused_parameters is None and not _has_experts(model):
        args.ddp_find_unused_parameters = False  # a search through the graph at every step
    if not isinstance(model, PeftModel):  # an adapter's own dropout was asked for
        _disable_dropout(model)
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if peft_config is not None:
        model = _with_adapter(model, peft_config, args.seed)
    if args.gradient_checkpointing and isinstance(model, PreTrainedModel | PeftModel):
        model.enable_input_require_grads()
    return model


def _with_adapter(model: Any, peft_config: PeftConfig, seed: int) -> Any:
    set_seed(seed)  # or each process would start from an adapter of its own
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise BonbonError(f"this adapter does not fit the model: {error}") from error


def _has_experts(model: nn.Module) -> bool:
    """Return whether the model has experts, so that a step may leave some weights unused."""
    return any("expert" in name for name, _ in model.named_modules())


def _disable_dropout(model: nn.Module) -> None:
    """Turn off dropout, so that the policy is the base model at the first step.

    The objectives assume that.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):  # of functional dropout
                setattr(module, name, 0.0)
