"""Build the sampler that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import (
    ModelConfig,
    OpenAISamplerConfig,
    SamplerConfig,
    SamplingConfig,
    VllmSamplerConfig,
)
from bonbon.models.loading import load_policy, load_tokenizer
from bonbon.sampling.sampler import Sampler
from bonbon.sampling.transformers import TransformersSampler


def load_model(model: ModelConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model and the tokenizer that the settings name. Raises BonbonError."""
    return load_policy(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )


@contextmanager
def opened_sampler(
    settings: SamplerConfig,
    model: ModelConfig,
    sampling: SamplingConfig,
    stream: str = "",
    load: Callable[[], tuple[PreTrainedModel, Tokenizer]] | None = None,
) -> Iterator[Sampler]:
    """The sampler that a configuration describes, closed at the end.

    `load` gives the model where it is loaded already. Raises BonbonError when it cannot be used.
    """
    sampler = _sampler(settings, model, sampling, stream, load or partial(load_model, model))
    try:
        yield sampler
    finally:
        sampler.close()


def _sampler(
    settings: SamplerConfig,
    model: ModelConfig,
    sampling: SamplingConfig,
    stream: str,
    load: Callable[[], tuple[PreTrainedModel, Tokenizer]],
) -> Sampler:
    if isinstance(settings, VllmSamplerConfig):
        from bonbon.sampling.vllm import VllmSampler

        return VllmSampler(model, sampling, settings, stream)
    if isinstance(settings, OpenAISamplerConfig):
        from bonbon.sampling.openai import OpenAISampler

        tokenizer, context = load_tokenizer(**_named(model))
        return OpenAISampler(tokenizer, sampling, settings, stream, context)
    return TransformersSampler(*load(), sampling, stream)


def named_tokenizer(model: ModelConfig, sampler: SamplerConfig) -> tuple[Tokenizer, int | None]:
    """A model's tokenizer, and the context that is left where this sampler draws.

    The model's weights are not read. Raises BonbonError.
    """
    tokenizer, context = load_tokenizer(**_named(model))
    known = [context]
    if isinstance(sampler, VllmSamplerConfig):
        known.append(sampler.max_model_len)
    elif isinstance(sampler, OpenAISamplerConfig):
        from bonbon.sampling.openai import server_context

        known.append(server_context(sampler))
    return tokenizer, min((length for length in known if length is not None), default=None)


def _named(model: ModelConfig) -> dict[str, Any]:
    return model.model_dump(include={"name", "revision", "trust_remote_code"})


def sampler_provenance(sampler: Sampler, model: ModelConfig) -> dict[str, Any]:
    """Return what the groups of a sampler note of it."""
    return {
        "model": model.name,
        "revision": model.revision,
        "sampling": sampler.config.model_dump(mode="json"),
        **sampler.described(),
    }
