"""Loading policies: a causal language model and its tokenizer, adapters included."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError, first_line

Quantization = Literal["nf4", "int8"]
BALANCED = "balanced"  # as a device: a model's layers, spread over all accelerators


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first accelerator that torch sees, else the CPU; draws need float64, so no MPS.

    Raises BonbonError for a device that torch does not know or this machine does not have.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            said = first_line(error)
            raise BonbonError(f"device {device!r} cannot be used here: {said}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on an accelerator and float32 on the CPU, where 16 bits are slow."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def forward_batch_tokens(asked: int | None, device: torch.device) -> int:
    """Padded tokens a forward pass without cache takes at once: `asked`, else by the device.

    A CPU computes batches that stay in its caches up to twice as fast.
    """
    if asked is not None:
        return asked
    return 1_024 if device.type == "cpu" else 16_384


def apply_chat_template(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> Any:
    """The template's encoding (`input_ids` and so on) of a conversation.

    Raises BonbonError when the template refuses the conversation, as some do a system message.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
    except TemplateError as error:
        raise BonbonError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses the "
            f"conversation that begins {messages[0]!r:.60}: {error}"
        ) from error


def load_pretrained(loader: Any, what: str, name: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`; BonbonError in one sentence when it cannot be loaded."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise BonbonError(f"{what} {name}: there is no such folder")
    try:
        return loader.from_pretrained(str(Path(name).expanduser()), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BonbonError(f"{what} {name} cannot be loaded: {first_line(error)}") from error


def load_policy(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model in evaluation mode, and its tokenizer.

    `name` is a Hugging Face model folder or id, or a PEFT adapter folder (its base is loaded with
    it). Weights are read from safetensors only. With `quantization` bitsandbytes quantises those of
    the linear layers. On the device `balanced` the layers are spread evenly over all accelerators,
    one behind the other; such a model can be measured, but not drawn from. Raises BonbonError when
    anything is missing, or does not fit.
    """
    spread = device == BALANCED
    where = pick_device("auto" if spread else device)
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() and not (
        folder / "adapter_model.safetensors"
    ).exists():
        raise BonbonError(f"model {name}: the adapter has no safetensors weights; convert it")
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_pretrained(
        AutoModelForCausalLM,
        "model",
        name,
        dtype=pick_dtype(dtype, where),
        use_safetensors=True,
        **({"device_map": BALANCED} if spread else {}),
        **_quantized(quantization, pick_dtype(dtype, where), where),
        **shared,
    )
    if spread:
        _check_fits(model, name, where)
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name, **shared)
    placed = spread or quantization  # else where they are read
    return (model if placed else model.to(where)).eval(), tokenizer


def _check_fits(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise BonbonError where layers that no accelerator had room for were put elsewhere."""
    places = set(map(str, devices_of(model)))
    if device.type != "cpu" and places & {"cpu", "disk"}:
        raise BonbonError(
            f"model {name} does not fit this machine's accelerators together; set the model's "
            "device to cpu, or use more of them"
        )


def devices_of(model: Any) -> set[Any]:
    """Where a model's layers were put by `balanced`; empty for a model that is in one place."""
    return set(getattr(model, "hf_device_map", {}).values())


def _quantized(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments that load quantised weights: nf4 as QLoRA has it, or LLM.int8()."""
    if quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise BonbonError(
            f"quantization {quantization} needs bitsandbytes; `pip install bitsandbytes`, or leave "
            "quantization out"
        )
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Tokenizer, int | None]:
    """A policy's tokenizer, and the context of its model, whose weights are not read.

    Raises BonbonError as `load_policy` does.
    """
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_pretrained(AutoConfig, "model", adapter_base(name), **shared)
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name, **shared)
    return tokenizer, config_context(config)


def adapter_base(name: str) -> str:
    """The model that an adapter folder was trained on; any other name as it is."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    if not adapter.exists():
        return name
    return str(read_json(adapter)["base_model_name_or_path"])


def end_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a completion: the generation config's and the tokenizer's."""
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ends))


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens a prompt and its completion may have together, where the model says so."""
    return config_context(model.config)


def config_context(config: Any) -> int | None:
    """The context that a model's configuration names; None where it names none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
