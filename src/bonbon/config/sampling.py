"""Settings of the base model, the prompts, and what draws completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bonbon.config.settings import Settings, named

DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Settings):
    """The base model."""

    name: str = Field(description="a model folder or hub id")
    revision: str | None = None
    dtype: DType = Field("auto", description="auto: float32 on a CPU, bfloat16 on an accelerator")
    device: str = Field(
        "auto",
        description="balanced: spread over all accelerators, to measure what one does not hold",
    )
    trust_remote_code: bool = False


class PromptsConfig(Settings):
    """A file of prompts: JSONL, CSV, Parquet or text."""

    path: Path
    column: str = "prompt"
    id_column: str = "prompt_id"
    split: str | None = Field(None, description="keep rows whose column `split` has this value")
    limit: int | None = Field(None, ge=1)


class SamplingConfig(Settings):
    """How completions are drawn. The defaults are the model's own distribution."""

    n: int = Field(8, ge=1, description="completions a prompt")
    max_new_tokens: int = Field(128, ge=1, description="longest completion, in tokens")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off")
    seed: int = 0
    max_batch_tokens: int = Field(32_768, ge=1, description="prompt and completion tokens a batch")
    on_long_prompt: Literal["error", "skip", "truncate"] = "error"
    shard_size: int = Field(64, ge=1, description="prompts a shard; a stop loses at most one shard")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p cuts tokens off the distribution."""
        return self.top_k > 0 or self.top_p < 1


class VllmSettings(Settings):
    """How vLLM runs a model (https://docs.vllm.ai: the names are those of `vllm.LLM`)."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer")
    pipeline_parallel_size: int = Field(1, ge=1, description="GPUs that share the layers")
    data_parallel_size: int = Field(1, ge=1, description="copies of the model")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_model_len: int | None = Field(None, ge=2, description="None: the model's own context")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of vllm.LLM, as they are"
    )


class TransformersSamplerConfig(Settings):
    """Draw with the model in this process, by transformers."""

    name: Literal["transformers"] = "transformers"


class VllmSamplerConfig(VllmSettings):
    """Draw with vLLM's offline engine."""

    name: Literal["vllm"] = "vllm"


class EndpointSettings(Settings):
    """Where an OpenAI-compatible server is."""

    base_url: str = Field("http://127.0.0.1:8000/v1", description="up to /completions")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key, if one is set"
    )


class ServerSettings(EndpointSettings):
    """An OpenAI-compatible server, and how it is asked."""

    model: str | None = Field(None, description="the server's name for it; None: its only one")
    timeout: float = Field(120.0, gt=0, description="seconds that a try may take")
    deadline: float = Field(600.0, gt=0, description="seconds of a request, tries and all")
    retries: int = Field(8, ge=0, description="of a request, with growing pauses")
    concurrency: int = Field(64, ge=1, description="requests at a time")


class OpenAISamplerConfig(ServerSettings):
    """Draw from a server."""

    name: Literal["openai"] = "openai"


SamplerConfig = Annotated[
    Annotated[
        TransformersSamplerConfig | VllmSamplerConfig | OpenAISamplerConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(named),
]
