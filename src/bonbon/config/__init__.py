"""The configuration of a run: one pydantic model, read from YAML, changed with `--set key=value`.

Relative paths are taken from the current folder. Loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.config.engine import EngineConfig as EngineConfig
    from bonbon.config.engine import LocalEngineConfig as LocalEngineConfig
    from bonbon.config.engine import PoolConfig as PoolConfig
    from bonbon.config.engine import RayEngineConfig as RayEngineConfig
    from bonbon.config.evaluation import EvaluationConfig as EvaluationConfig
    from bonbon.config.evaluation import JudgeConfig as JudgeConfig
    from bonbon.config.evaluation import LMEvalConfig as LMEvalConfig
    from bonbon.config.evaluation import TextsConfig as TextsConfig
    from bonbon.config.evaluation import is_policy_name as is_policy_name
    from bonbon.config.reward import RewardConfig as RewardConfig
    from bonbon.config.reward import RewardServerConfig as RewardServerConfig
    from bonbon.config.run import RunConfig as RunConfig
    from bonbon.config.run import load_config as load_config
    from bonbon.config.run import parse_config as parse_config
    from bonbon.config.run import round_config as round_config
    from bonbon.config.sampling import DType as DType
    from bonbon.config.sampling import EndpointSettings as EndpointSettings
    from bonbon.config.sampling import ModelConfig as ModelConfig
    from bonbon.config.sampling import OpenAISamplerConfig as OpenAISamplerConfig
    from bonbon.config.sampling import PromptsConfig as PromptsConfig
    from bonbon.config.sampling import SamplerConfig as SamplerConfig
    from bonbon.config.sampling import SamplingConfig as SamplingConfig
    from bonbon.config.sampling import ServerSettings as ServerSettings
    from bonbon.config.sampling import TransformersSamplerConfig as TransformersSamplerConfig
    from bonbon.config.sampling import VllmSamplerConfig as VllmSamplerConfig
    from bonbon.config.sampling import VllmSettings as VllmSettings
    from bonbon.config.training import LARGEST_N as LARGEST_N
    from bonbon.config.training import LoraSettings as LoraSettings
    from bonbon.config.training import TrainConfig as TrainConfig
    from bonbon.config.training import TrainerArguments as TrainerArguments

_HOMES = {
    "DType": "sampling",
    "EndpointSettings": "sampling",
    "EngineConfig": "engine",
    "EvaluationConfig": "evaluation",
    "JudgeConfig": "evaluation",
    "LARGEST_N": "training",
    "LMEvalConfig": "evaluation",
    "LocalEngineConfig": "engine",
    "LoraSettings": "training",
    "ModelConfig": "sampling",
    "OpenAISamplerConfig": "sampling",
    "PoolConfig": "engine",
    "PromptsConfig": "sampling",
    "RayEngineConfig": "engine",
    "RewardConfig": "reward",
    "RewardServerConfig": "reward",
    "RunConfig": "run",
    "SamplerConfig": "sampling",
    "SamplingConfig": "sampling",
    "ServerSettings": "sampling",
    "TextsConfig": "evaluation",
    "TrainConfig": "training",
    "TrainerArguments": "training",
    "TransformersSamplerConfig": "sampling",
    "VllmSamplerConfig": "sampling",
    "VllmSettings": "sampling",
    "is_policy_name": "evaluation",
    "load_config": "run",
    "parse_config": "run",
    "round_config": "run",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
