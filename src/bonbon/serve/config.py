"""The settings of `bonbon serve`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from bonbon.config.sampling import SamplingConfig
from bonbon.config.settings import Settings
from bonbon.decoding.config import DEFAULT_STRATEGY, StrategySetting
from bonbon.remote.endpoints import is_loopback, secret_from
from bonbon.system.errors import BonbonError


class ServeConfig(Settings):
    """The address of the server, and the defaults and limits of requests.

    `sampling` and `strategy` are the defaults of requests; `sampling.n` candidates are drawn.
    """

    host: str = Field(
        "127.0.0.1", min_length=1, description="needs a key unless it is this machine"
    )
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    api_key_env: str = Field(
        "BONBON_API_KEY", description="the environment variable that holds the key, if one is set"
    )
    sampling: SamplingConfig = SamplingConfig()
    strategy: StrategySetting = Field(DEFAULT_STRATEGY, validate_default=True)
    concurrency: int = Field(8, ge=1, description="jobs at a time; a prompt is a job")
    queue: int = Field(64, ge=0, description="jobs that may wait; further requests get a 429")
    deadline: float = Field(120.0, gt=0, description="seconds that a request may take")
    max_best_of: int = Field(128, ge=1, description="candidates that a request may ask for")
    max_tokens: int = Field(4096, ge=1, description="completion tokens that a request may ask for")
    max_body_bytes: int = Field(2**20, ge=1, description="of a request")
    keepalive: float = Field(
        10.0, gt=0, description="seconds between comments in a stream that waits for its answer"
    )
    grace: float = Field(30.0, ge=0, description="seconds for running jobs to finish at a stop")

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Self:
        if self.sampling.n > self.max_best_of:
            raise ValueError(f"sampling.n is more than max_best_of ({self.max_best_of})")
        if self.sampling.max_new_tokens > self.max_tokens:
            raise ValueError(f"sampling.max_new_tokens is more than max_tokens ({self.max_tokens})")
        return self


def api_key(config: ServeConfig) -> str:
    """Return the key that requests must have, or "" for none.

    Raises BonbonError when the key cannot be used, or when there is none and other machines can
    reach the server.
    """
    key = secret_from(config.api_key_env, "serve")
    if not key and not is_loopback(config.host):
        raise BonbonError(
            f"without a key, everybody who reaches {config.host} could use this server; set the "
            f"environment variable {config.api_key_env} to a key, or leave serve.host at 127.0.0.1"
        )
    return key
