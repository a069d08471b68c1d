"""Settings of a reward: a model, a function, a server, or a weighted sum."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bonbon.config.sampling import DType, ServerSettings, VllmSettings
from bonbon.config.settings import Settings


class RewardServerConfig(ServerSettings):
    """A server that scores: a reward model behind one of vLLM's routes."""

    api: Literal["pooling", "classify", "score"] = Field("pooling", description="the route")
    tokenizer: str | None = Field(
        None,
        description="the model's folder or hub id: its tokens are sent to pooling and classify; "
        "None: the server tokenises",
    )


class RewardConfig(Settings):
    """A reward: exactly one of a model, a function, a server, or a weighted sum of rewards."""

    model: str | None = Field(None, description="a sequence-classification model with one output")
    function: str | None = Field(None, description="package.module:function")
    server: RewardServerConfig | None = None
    sum: tuple[RewardConfig, ...] | None = None
    vllm: VllmSettings | None = Field(None, description="run `model` by vLLM; None: transformers")
    weight: float = Field(1.0, description="as a part of a sum")
    revision: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    max_batch_tokens: int | None = Field(None, ge=1, description="None: by the device")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in (self.model, self.function, self.server, self.sum) if kind]
        if len(kinds) != 1:
            raise ValueError("a reward is exactly one of `model`, `function`, `server` and `sum`")
        if self.vllm is not None and self.model is None:
            raise ValueError("vllm says how `model` is run; name one")
        return self
