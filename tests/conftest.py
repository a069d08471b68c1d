"""What the tests share: real data where it is there, tiny models built on the spot, and groups."""

from __future__ import annotations

import os

# Before anything imports transformers or datasets.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bonbon.groups.group import Group, Groups, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
CONTEXT = 64
PAD, BOS, EOS = 0, 1, 2

MakeGroup = Callable[..., Group]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one when the others are done."""
    longest = ("test_resume.py", "test_pipeline.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(autouse=True)
def _clean_logging() -> Iterator[None]:
    """Each test leaves the root logger as it found it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


# --- real data ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data; it is not part of the repository."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the shared data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A pretrained model of 260,032 parameters that writes children's stories."""
    folder = shared / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the model is not at {folder}")
    return folder


# --- tiny models ----------------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama: 259 byte-level tokens, context 64."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random reward model over the same tokenizer."""
    return build_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny-reward")


# --- groups ---------------------------------------------------------------------------------------


def group_of(
    prompt_id: str = "p0",
    prompt: Prompt = "Once upon a time",
    completions: Sequence[str] = (" there was", " a cat", ""),
    **changes: Any,
) -> Group:
    """A group whose other columns are made up to fit its completions."""
    n = len(completions)
    values: dict[str, Any] = {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "prompt_token_ids": (BOS, 10, 11),
        "completions": tuple(completions),
        "token_ids": tuple((*range(20, 20 + k), EOS) for k in range(n)),
        "logprobs": tuple(-1.5 * (k + 1) for k in range(n)),
        "finish_reasons": ("stop",) * n,
    }
    return Group(**(values | changes))


def assert_same_groups(found: Groups, expected: Groups) -> None:
    """The same draws and rewards; log-probabilities as near as batches allow."""
    assert [g.prompt_id for g in found] == [g.prompt_id for g in expected]
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert [g.rewards for g in found] == [g.rewards for g in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)


@pytest.fixture(scope="session")
def make_group() -> MakeGroup:
    """`make_group(prompt_id, prompt, completions, rewards=..., ...)`."""
    return group_of
