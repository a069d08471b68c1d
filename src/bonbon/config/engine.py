"""Settings of where the stages run: in this process, or on a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bonbon.config.settings import Settings, named


class PoolConfig(Settings):
    """Workers of one kind: as many as there is work for, between `min` and `max`."""

    min: int = Field(1, ge=1, description="Workers that are kept, however little there is to do.")
    max: int = Field(1, ge=1, description="Most workers.")
    num_cpus: float = Field(1.0, ge=0, description="CPU cores of each worker.")
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs of each worker; a fraction shares a GPU between workers."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class LocalEngineConfig(Settings):
    """Sample and score in this process."""

    name: Literal["local"] = Field("local", description="Run in this process.")


class RayEngineConfig(Settings):
    """Sample and score by Ray's workers, both at a time."""

    name: Literal["ray"] = Field("ray", description="Run on a Ray cluster.")
    address: str | None = Field(
        None, description="The cluster's address. None: start one on this machine."
    )
    samplers: PoolConfig = Field(PoolConfig(), description="Workers that draw completions.")
    scorers: PoolConfig = Field(PoolConfig(), description="Workers that score completions.")
    tries: int = Field(
        3, ge=1, description="How often to try a prompt that fails or kills its worker."
    )
    max_dead_letters: int = Field(
        100, ge=0, description="Prompts that may be set aside as failed before the run ends."
    )


EngineConfig = Annotated[
    Annotated[LocalEngineConfig | RayEngineConfig, Field(discriminator="name")],
    BeforeValidator(named),
]
