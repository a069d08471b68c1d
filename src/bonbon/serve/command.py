"""The `bonbon serve` command: builds a backend and a reward, and runs the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import ModelConfig
from bonbon.config.settings import parse_settings
from bonbon.decoding.catalogue import strategy_name
from bonbon.decoding.config import check_strategy_has_reward, without_run_sections
from bonbon.serve.backend import Backend
from bonbon.serve.config import ServeConfig
from bonbon.serve.upstream.client import UpstreamConfig
from bonbon.system.errors import BonbonError

# Fields that only the upstream acts on.
PASSED_ON = frozenset(
    {
        "chat_template_kwargs", "frequency_penalty", "logit_bias", "min_p", "presence_penalty",
        "reasoning_effort", "repetition_penalty", "response_format", "structured_outputs",
        "verbosity",
    }
)  # fmt: skip


class ServeSettings(ServeConfig):
    """The settings of a server: how it listens, and its model, upstream and reward."""

    model: ModelConfig | None = Field(None, description="a model to load into this process")
    upstream: UpstreamConfig | None = Field(None, description="or a server to draw from")
    reward: RewardConfig | None = Field(None, description="None: only for strategies that vote")
    served_model_name: str | None = Field(
        None,
        min_length=1,
        description="the name of a loaded model in requests; None: its folder's name",
    )

    @model_validator(mode="after")
    def _one_backend(self) -> Self:
        if (self.model is None) == (self.upstream is None):
            raise ValueError(
                "a server needs exactly one of a `model` and an `upstream`; name it with --model "
                "or --upstream"
            )
        if self.upstream is not None and self.strategy.stepwise:
            raise ValueError(
                f"strategy {strategy_name(self.strategy)} drops or branches completions while they "
                "are drawn, which an upstream cannot do; take a --model, or a strategy such as "
                "best_of_n"
            )
        return self


def parse_serve_settings(
    values: Any, overrides: Sequence[str] = (), source: str = "the command line"
) -> ServeSettings:
    """Return checked settings; sections that only a run has (`train` and so on) are ignored.

    Raises BonbonError naming the wrong key or value and what was expected.
    """
    values = without_run_sections(values, ServeSettings)
    settings = parse_settings(ServeSettings, values, overrides, source)
    check_strategy_has_reward(settings.strategy, settings.reward)
    return settings


def serve(settings: ServeSettings) -> None:
    """Load the backend and the reward, and run the server until a signal stops it.

    Raises BonbonError when something cannot be loaded, and in the cases of `run.serve`.
    """
    try:
        from bonbon.serve import run
    except ImportError as error:
        raise BonbonError(
            f"the server needs {error.name}: pip install 'bonbon-align[serve]'"
        ) from error
    from bonbon.rewards.from_config import build_reward
    from bonbon.serve.config import api_key

    api_key(settings)  # checked first: loading takes long
    reward = None if settings.reward is None else build_reward(settings.reward)
    if settings.upstream is not None:
        from bonbon.serve.upstream.backend import UpstreamBackend

        upstream = UpstreamBackend(settings.upstream, reward)
        run.serve(settings, lambda: upstream, PASSED_ON)
        return
    local = _local_backend(settings, reward)
    run.serve(settings, lambda: local)


def _local_backend(settings: ServeSettings, reward: Any) -> Backend:
    from bonbon.sampling.from_config import load_model
    from bonbon.serve.local.backend import LocalBackend

    assert settings.model is not None
    model, tokenizer = load_model(settings.model)
    path = Path(settings.model.name).expanduser()
    name = settings.served_model_name or (
        path.resolve().name if path.exists() else settings.model.name
    )
    return LocalBackend(model, tokenizer, reward, name, settings.sampling.max_batch_tokens)
