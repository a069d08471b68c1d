"""Settings of a reward: a model, a function, a server, or a weighted sum."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bonbon.config.fields import Neutral
from bonbon.config.sampling import DType, ServerSettings, VllmSettings
from bonbon.config.settings import Settings


class RewardServerConfig(ServerSettings):
    """A server that scores: a reward model behind one of vLLM's routes."""

    api: Literal["pooling", "classify", "score"] = Field(
        "pooling", description="The server's route that gives the scores."
    )
    tokenizer: str | None = Field(
        None,
        description="The model's folder or hub id: its tokens are sent to pooling and classify. "
        "None: the server tokenises.",
    )


class RewardConfig(Settings):
    """A reward: exactly one of a model, a function, a server, or a weighted sum of rewards."""

    model: str | None = Field(
        None, description="A sequence-classification model with one output: its folder or hub id."
    )
    function: str | None = Field(
        None, description="A Python function of yours, as package.module:function."
    )
    server: RewardServerConfig | None = Field(None, description="A server that scores.")
    sum: tuple[RewardConfig, ...] | None = Field(
        None, description="A list of rewards, each with its weight."
    )
    vllm: VllmSettings | None = Field(
        None, description="Run `model` by vLLM. None: by transformers."
    )
    weight: float = Field(1.0, description="The weight of this reward in a sum.")
    revision: str | None = Field(
        None, description="The hub's branch, tag or commit. None: its main branch."
    )
    dtype: DType = Field(
        "auto",
        description="Number format of the weights. auto: float32 on a CPU, bfloat16 on an "
        "accelerator.",
    )
    device: Neutral[str] = Field("auto", description="Where `model` runs, such as cpu or cuda:1.")
    max_batch_tokens: Neutral[int | None] = Field(
        None, ge=1, description="Most tokens in a batch. None: by the device."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for sources you trust."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in (self.model, self.function, self.server, self.sum) if kind]
        if len(kinds) != 1:
            raise ValueError("a reward is exactly one of `model`, `function`, `server` and `sum`")
        if self.vllm is not None and self.model is None:
            raise ValueError("vllm says how `model` is run; name one")
        return self
