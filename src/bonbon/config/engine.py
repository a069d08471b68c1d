"""Settings of where the stages run: in this process, or on a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bonbon.config.settings import Settings, named


class PoolConfig(Settings):
    """Workers of one kind: as many as there is work for, between `min` and `max`."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0, description="of each worker")
    num_gpus: float = Field(0.0, ge=0, description="of each worker; a fraction shares a GPU")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class LocalEngineConfig(Settings):
    """Sample and score in this process."""

    name: Literal["local"] = "local"


class RayEngineConfig(Settings):
    """Sample and score by Ray's workers, both at a time."""

    name: Literal["ray"] = "ray"
    address: str | None = Field(None, description="of a cluster; None: one on this machine")
    samplers: PoolConfig = PoolConfig()
    scorers: PoolConfig = PoolConfig()
    tries: int = Field(3, ge=1, description="of a prompt that fails or kills its worker")
    max_dead_letters: int = Field(100, ge=0, description="prompts set aside before the run ends")


EngineConfig = Annotated[
    Annotated[LocalEngineConfig | RayEngineConfig, Field(discriminator="name")],
    BeforeValidator(named),
]
