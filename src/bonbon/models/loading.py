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
    """Return a device by name; `auto` is the first accelerator that torch sees, else the CPU.

    `auto` does not choose MPS, since draws need float64. Raises BonbonError for a device that torch
    does not know or this machine does not have.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = first_line(error)
            raise BonbonError(f"device {device!r} cannot be used here: {reason}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return a dtype by name; `auto` is bfloat16, but float32 on a CPU, where 16 bits are slow."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def forward_batch_tokens(setting: int | None, device: torch.device) -> int:
    """Return the padded tokens of a forward pass without cache: the setting, else by the device.

    A CPU computes batches that fit in its caches up to twice as fast.
    """
    if setting is not None:
        return setting
    return 1_024 if device.type == "cpu" else 16_384


def apply_chat_template(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> Any:
    """Encode a conversation by the tokenizer's chat template (`input_ids` and so on).

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
    """Call `loader.from_pretrained(name)`. Raises BonbonError when it cannot be loaded."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise BonbonError(f"{what} {name}: there is no such folder; check the path")
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
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `name` is a Hugging Face model folder or id, or a PEFT adapter folder (whose base model is
    loaded too). Weights are read from safetensors only. With `quantization` bitsandbytes quantises
    the weights of linear layers. On the device `balanced` consecutive layers are spread evenly over
    all accelerators; such a model can be measured, but not sampled from. Raises BonbonError when
    anything is missing or does not fit.
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
    placed = spread or quantization  # already on its devices
    return (model if placed else model.to(where)).eval(), tokenizer


def _check_fits(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise BonbonError where some layers did not fit on the accelerators."""
    places = set(map(str, devices_of(model)))
    if device.type != "cpu" and places & {"cpu", "disk"}:
        raise BonbonError(
            f"model {name} does not fit this machine's accelerators together; set the model's "
            "device to cpu, or use more of them"
        )


def devices_of(model: Any) -> set[Any]:
    """Return the devices that `balanced` put a model's layers on; empty for any other model."""
    return set(getattr(model, "hf_device_map", {}).values())


def _quantized(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the arguments that load quantised weights: nf4 as in QLoRA, or LLM.int8()."""
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
    """Load a policy's tokenizer, and its model's context length (tokens), but no weights.

    Raises BonbonError as `load_policy` does.
    """
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_pretrained(AutoConfig, "model", adapter_base(name), **shared)
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name, **shared)
    return tokenizer, config_context(config)


def adapter_base(name: str) -> str:
    """Return the base model of an adapter folder; any other name unchanged."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    if not adapter.exists():
        return name
    return str(read_json(adapter)["base_model_name_or_path"])


def end_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a completion: those of the model's configs and the tokenizer."""
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ends))


def context_length(model: PreTrainedModel) -> int | None:
    """Return the most tokens of a prompt and its completion together; None where not known."""
    return config_context(model.config)


def config_context(config: Any) -> int | None:
    """Return the context length (tokens) in a model's configuration; None where it has none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
