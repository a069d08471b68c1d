"""Tiny models and a byte tokenizer, built on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 64
PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes, and pad, bos and eos; a text begins with bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama_config(**changes: Any) -> Any:
    """A Llama of 2 layers and 16 hidden units over the byte tokenizer's vocabulary."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return LlamaConfig(**(values | changes))


def build_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Save a tiny random causal language model, float32, in `folder`."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def build_tiny_reward_model(folder: Path, seed: int = 1, num_labels: int = 1) -> Path:
    """Save a tiny random sequence-classification model, float32, in `folder`."""
    import torch
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(tiny_llama_config(num_labels=num_labels))
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
