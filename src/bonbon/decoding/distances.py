"""Distances between candidates, by embeddings or by a user's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bonbon.decoding.strategy import Floats, Source
from bonbon.groups.group import Group
from bonbon.system.errors import BonbonError, UserCodeError
from bonbon.system.user_functions import error_text, import_function

EMBEDDING = "embedding"


def load_distance(distance: str, embedding: str | None) -> None:
    """Load what `distances` needs, so that a failure comes before anything is drawn.

    Raises BonbonError for a function that cannot be imported or a model that cannot be loaded.
    """
    if distance != EMBEDDING:
        import_function(distance, "distance function")
    elif embedding is not None:
        _embedding_model(embedding)


def distances(distance: str, embedding: str | None, group: Group, source: Source | None) -> Floats:
    """Return the distances d[i, j] from completion i to j, (n, n); need not be symmetric.

    Args:
        distance: "embedding" for the cosine distance, or `package.module:function`, called with the
            list of completions.
        embedding: a model folder or hub id that embeds the texts; None: `source` embeds them.

    Raises BonbonError if the distances cannot be computed, or if one is negative or not finite.
    """
    if distance != EMBEDDING:
        return function_distances(distance, group)
    if embedding is not None:
        embedded = embed_texts(embedding, group.completions)
    elif source is not None:
        embedded = source.embed(group)
    else:
        raise BonbonError(
            "embedding distances need a source that embeds completions, or a model named by "
            "`embedding`"
        )
    return _checked(cosine_distances(embedded), "distance of embeddings", group)


def cosine_distances(embeddings: ArrayLike) -> Floats:
    """Return 1 − cos between embeddings of shape (n, width): (n, n), in [0, 2], zero diagonal.

    A vector of zeros, such as an empty completion's, has distance 1 from all others and 0 from
    another vector of zeros.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(x, axis=1)
    empty = norms == 0
    unit = x / np.where(empty, 1.0, norms)[:, None]
    apart = np.clip(1 - unit @ unit.T, 0, 2)
    apart[np.ix_(empty, empty)] = 0.0
    np.fill_diagonal(apart, 0.0)
    return np.asarray(apart)


def function_distances(name: str, group: Group) -> Floats:
    """Return the distances that a function `package.module:function` gives the completions.

    Raises BonbonError when it fails, returns another shape, or a distance that is negative, NaN or
    infinite.
    """
    function: Callable[[Sequence[str]], Any] = import_function(name, "distance function")
    try:
        apart = np.asarray(function(list(group.completions)), dtype=np.float64)
    except Exception as error:  # the user's code may raise anything
        raise UserCodeError(f"distance function {name!r} failed: {error_text(error)}") from error
    return _checked(apart, f"distance function {name!r}", group)


def _checked(apart: Floats, what: str, group: Group) -> Floats:
    if apart.shape != (group.n, group.n):
        raise BonbonError(
            f"{what}: the shape is {apart.shape} for {group.n} completions; it must be "
            f"({group.n}, {group.n})"
        )
    for i, j in np.argwhere(~(np.isfinite(apart) & (apart >= 0))):
        raise BonbonError(
            f"{what}: from completion {i + 1} to completion {j + 1} of prompt {group.prompt_id} it "
            f"is {apart[i, j]}; a distance is finite and at least 0"
        )
    return apart


def embed_texts(name: str, texts: Sequence[str]) -> Floats:
    """Return a model's last hidden states, averaged over each text's tokens, (n, hidden width).

    Special tokens count. Texts too long for the model are cut at the end. A text without tokens has
    a vector of zeros. Raises BonbonError when the model cannot be loaded (from safetensors).
    """
    from bonbon.models.loading import forward_batch_tokens
    from bonbon.models.padding import token_batches

    model, tokenizer = _embedding_model(name)
    longest = _longest_input(model, tokenizer)
    rows = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    embedded = np.zeros((len(texts), model.config.get_text_config().hidden_size))
    some = [index for index, row in enumerate(rows) if row]
    lengths = [len(rows[index]) for index in some]
    for batch in token_batches(
        [rows[index] for index in some], lengths, forward_batch_tokens(None, model.device)
    ):
        indices = [some[place] for place in batch]
        embedded[indices] = _pooled(model, tokenizer, [rows[index] for index in indices])
    return embedded


def _longest_input(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # `model_max_length` is a huge number if the tokenizer knows no limit.
    return int(min(tokenizer.model_max_length, positions or 2**31 - 1, 2**31 - 1))


@lru_cache(maxsize=2)
def _embedding_model(name: str) -> tuple[Any, Any]:
    """Load a model in evaluation mode and its tokenizer; cached, since every prompt needs them."""
    from transformers import AutoModel, AutoTokenizer

    from bonbon.models.loading import load_pretrained, pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype("auto", device)
    model = load_pretrained(AutoModel, "embedding model", name, dtype=dtype, use_safetensors=True)
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _pooled(model: Any, tokenizer: Any, rows: Sequence[list[int]]) -> Floats:
    import torch

    padded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    padded = padded.to(model.device)
    with torch.inference_mode():
        hidden = model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        ).last_hidden_state
    mask = padded["attention_mask"][..., None].double()
    pooled = (hidden.double() * mask).sum(dim=1) / mask.sum(dim=1)
    return np.asarray(pooled.cpu())
