"""Settings of the base model, the prompts, and what draws completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bonbon.config.fields import Neutral
from bonbon.config.settings import Settings, named

DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Settings):
    """The base model."""

    name: str = Field(description="A model folder or hub id.")
    revision: str | None = Field(
        None, description="The hub's branch, tag or commit. None: its main branch."
    )
    dtype: DType = Field(
        "auto",
        description="Number format of the weights. auto: float32 on a CPU, bfloat16 on an "
        "accelerator.",
    )
    device: Neutral[str] = Field(
        "auto",
        description="Where the model runs, such as cpu or cuda:1. auto: an accelerator where there "
        "is one. balanced: spread over all accelerators, to measure a model that one cannot hold.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for sources you trust."
    )


class PromptsConfig(Settings):
    """A file of prompts: JSONL, CSV, Parquet or text."""

    path: Path = Field(description="The file.")
    column: str = Field("prompt", description="The column that holds the prompts.")
    id_column: str = Field(
        "prompt_id",
        description="The column that holds a unique id of each prompt, if there is one.",
    )
    split: str | None = Field(
        None, description="Keep only the rows whose column `split` has this value. None: all rows."
    )
    limit: int | None = Field(None, ge=1, description="Keep only so many rows. None: all.")


class SamplingConfig(Settings):
    """Settings of the draws. The defaults are the model's own distribution."""

    n: int = Field(8, ge=1, description="Completions of each prompt.")
    max_new_tokens: int = Field(128, ge=1, description="The longest completion, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the likeliest tokens of this total probability."
    )
    top_k: int = Field(0, ge=0, description="Draw from the k likeliest tokens. 0: from all.")
    seed: int = Field(0, description="Seed of the draws.")
    max_batch_tokens: Neutral[int] = Field(
        32_768, ge=1, description="Most prompt and completion tokens in a batch."
    )
    on_long_prompt: Literal["error", "skip", "truncate"] = Field(
        "error", description="What to do with a prompt that is longer than the model's context."
    )
    shard_size: int = Field(
        64, ge=1, description="Prompts in a shard; a stop loses at most one shard."
    )

    @property
    def truncates(self) -> bool:
        """Return whether top-k or top-p cuts tokens off the distribution."""
        return self.top_k > 0 or self.top_p < 1


class VllmSettings(Settings):
    """Settings of vLLM; the names are those of `vllm.LLM` (https://docs.vllm.ai)."""

    tensor_parallel_size: Neutral[int] = Field(1, ge=1, description="GPUs that share each layer.")
    pipeline_parallel_size: Neutral[int] = Field(1, ge=1, description="GPUs that share the layers.")
    gpu_memory_utilization: Neutral[float] = Field(
        0.9, gt=0, le=1, description="The share of a GPU's memory that vLLM takes."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="The longest prompt with completion. None: the model's own context."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vllm.LLM, passed on as they are."
    )


class TransformersSamplerConfig(Settings):
    """Draw with the model in this process, by transformers."""

    name: Literal["transformers"] = Field(
        "transformers", description="Draw in this process, by transformers."
    )


class VllmSamplerConfig(VllmSettings):
    """Draw with vLLM's offline engine."""

    name: Literal["vllm"] = Field("vllm", description="Draw by vLLM's offline engine.")


class EndpointSettings(Settings):
    """Address and key of an OpenAI-compatible server."""

    base_url: Neutral[str] = Field(
        "http://127.0.0.1:8000/v1", description="Its address, up to /completions."
    )
    api_key_env: Neutral[str] = Field(
        "OPENAI_API_KEY", description="The environment variable that holds the key, if one is set."
    )


class ClientSettings(Settings):
    """Timeouts and retries of a server's client."""

    timeout: float = Field(120.0, gt=0, description="Seconds that one try may take.")
    deadline: float = Field(
        600.0, gt=0, description="Seconds that a request may take, with all its tries."
    )
    retries: int = Field(
        8, ge=0, description="Further tries of a request that failed, with growing pauses."
    )


class ServerSettings(EndpointSettings):
    """An OpenAI-compatible server, and how it is asked."""

    model: str | None = Field(
        None, description="The server's name for the model. None: its only model."
    )
    concurrency: Neutral[int] = Field(64, ge=1, description="Requests at a time.")
    client: Neutral[ClientSettings] = Field(
        ClientSettings(), description="Timeouts and retries of requests."
    )


class OpenAISamplerConfig(ServerSettings):
    """Draw from a server."""

    name: Literal["openai"] = Field("openai", description="Draw from an OpenAI-compatible server.")


SamplerConfig = Annotated[
    Annotated[
        TransformersSamplerConfig | VllmSamplerConfig | OpenAISamplerConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(named),
]
