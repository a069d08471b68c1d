"""The file of `bonbon plan --cluster`: the job, the machines, the speed of samplers and scorers.

Speeds are stated (best: measured), or estimated from descriptions of GPU and model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from bonbon.config.settings import Settings, parse_settings, read_yaml
from bonbon.planning.cluster.on_paper import Accelerator, Method, ModelShape
from bonbon.system.errors import BonbonError


class LengthsConfig(Settings):
    """Lengths in tokens: a gamma distribution, cut off at `longest`."""

    mean: float = Field(ge=1, description="before the cut")
    spread: float = Field(0.0, ge=0, description="standard deviation, before the cut")
    longest: int | None = Field(None, ge=1)


class JobConfig(Settings):
    """The completions to draw and score."""

    prompts: int = Field(ge=1)
    n: int | None = Field(None, ge=1, description="completions a prompt; None: by the pilot")
    prompt_tokens: LengthsConfig | None = Field(None, description="None: the pilot's")
    completion_tokens: LengthsConfig | None = Field(None, description="None: the pilot's")
    shard_size: int = Field(64, ge=1, description="prompts a shard")
    waiting_shards: int | None = Field(
        None, ge=0, description="most between samplers and scorers; None: two a scorer, as Ray has"
    )
    seed: int = 0


class NodesConfig(Settings):
    """The machines."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(8, ge=1)
    cpus_per_node: int = Field(0, ge=0, description="for scorers without a GPU")
    price_per_gpu_hour: float = Field(0.0, ge=0)
    mtbf_hours: float | None = Field(None, gt=0, description="mean time between a node's failures")
    repair_seconds: float = Field(600.0, ge=0, description="until another node is in its place")

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node


class SamplersConfig(Settings):
    """One sampler: a copy of the model on `gpus` GPUs."""

    gpus: int = Field(1, ge=1)
    rows: int = Field(256, ge=1, description="completions decoded together (max_num_seqs)")
    continuous: bool = Field(True, description="a row that ends makes place for the next")
    decode_tokens_per_second: float | None = Field(
        None, gt=0, description="of `rows` rows together; None: estimated"
    )
    prefill_tokens_per_second: float | None = Field(None, gt=0, description="None: estimated")
    utilisation: float = Field(0.5, gt=0, le=1, description="of bandwidth and peak, decoding")
    prefill_utilisation: float = Field(0.4, gt=0, le=1, description="of the peak")
    startup_seconds: float = Field(0.0, ge=0)


class ScorersConfig(Settings):
    """One scorer: a reward model on GPUs, a fraction of one, or on CPUs alone (`gpus: 0`)."""

    gpus: float = Field(1.0, ge=0)
    cpus: float = Field(1.0, gt=0, description="counted where it uses no GPU")
    tokens_per_second: float | None = Field(None, gt=0, description="prompt and completion")
    completions_per_second: float | None = Field(None, gt=0)
    shared_prompt: bool = Field(False, description="a prompt is read once for its completions")
    utilisation: float = Field(0.4, gt=0, le=1, description="of the peak")
    startup_seconds: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if self.tokens_per_second and self.completions_per_second:
            raise ValueError("state tokens_per_second or completions_per_second, not both")
        return self


class TrainingConfig(Settings):
    """The training that follows; used only for its estimates."""

    gpus: int = Field(ge=1)
    method: Method = "full"
    r: int = Field(16, ge=1, description="the adapter's rank")
    gradient_checkpointing: bool = True
    pass_tokens: int = Field(8192, ge=1, description="tokens a GPU holds in one pass")
    epochs: float = Field(1.0, gt=0)
    utilisation: float = Field(0.35, gt=0, le=1, description="of the peak")


class ClusterConfig(Settings):
    """The contents of the file that `bonbon plan --cluster` reads."""

    job: JobConfig
    cluster: NodesConfig
    sampler: SamplersConfig = SamplersConfig()
    scorer: ScorersConfig = ScorersConfig()
    gpu: Accelerator | None = None
    model: ModelShape | None = None
    reward_model: ModelShape | None = None
    train: TrainingConfig | None = None

    @model_validator(mode="after")
    def _placeable(self) -> Self:
        node = self.cluster.gpus_per_node
        if self.sampler.gpus > node and self.sampler.gpus % node:
            raise ValueError(
                f"sampler.gpus: a sampler over several nodes takes whole ones, a multiple of {node}"
            )
        if self.scorer.gpus > node:
            raise ValueError(f"scorer.gpus: a scorer must fit a node's {node} GPUs")
        return self

    @model_validator(mode="after")
    def _speeds_known(self) -> Self:
        sampler, scorer = self.sampler, self.scorer
        measured = sampler.decode_tokens_per_second and sampler.prefill_tokens_per_second
        if not measured and not (self.gpu and self.model):
            raise ValueError(
                "sampler: state decode_tokens_per_second and prefill_tokens_per_second, or "
                "describe gpu and model, from which they are estimated"
            )
        stated = scorer.tokens_per_second or scorer.completions_per_second
        if not stated and not (self.gpu and self.reward_model and scorer.gpus):
            raise ValueError(
                "scorer: state tokens_per_second or completions_per_second, or describe gpu and "
                "reward_model, from which they are estimated for scorers with GPUs"
            )
        if self.train and not (self.gpu and self.model):
            raise ValueError("train: the training's estimates need gpu and model")
        return self


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster's YAML file. Raises BonbonError naming the wrong key or value."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise BonbonError(f"{path}: expected the keys job, cluster, sampler and scorer")
    return parse_settings(ClusterConfig, values, source=str(path))
