"""The configuration of a run: one pydantic model, read from YAML, changed with `--set key=value`.

Relative paths are taken from the current folder. Loads no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bonbon.settings import Settings, named, parse_settings, read_yaml

DType = Literal["auto", "float32", "bfloat16", "float16"]
ObjectiveName = Literal[
    "bonbon",
    "sft_bon",
    "ipo_bon",
    "bonbon_dpo",
    "bonbon_ranks",
    "rank_regression",
    "rank_regression_pointwise",
    "rank_regression_huber",
    "weighted_sft",
    "dpo",
    "dpo_best_random",
    "dpo_random_pair",
    "ipo",
    "ipo_best_random",
    "ipo_random_pair",
]
# What the evaluation measures anyway (`evaluation.drift`, which a test holds equal).
OWN_METRICS = frozenset(
    {
        "length", "characters", "repetition", "refusal", "truncation", "empty",
        "distinct_1", "distinct_2", "self_bleu",
    }
)  # fmt: skip
LARGEST_N = 10_000  # beyond, targets by rank are no longer exact
TiltName = Literal["best_of_n", "optimal", "worst_of_n"]


_BAD_NAME = "is taken or not made of letters, digits, '-' and '_'"


def _is_name(text: str) -> bool:
    return text.replace("-", "").replace("_", "").isalnum()


def is_policy_name(text: str) -> bool:
    """Whether the evaluation can call a policy so: it keeps what it draws in folders of endings."""
    return _is_name(text) and not text.endswith(("-prompts", "-samples", "-forward"))


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


# --- what draws -----------------------------------------------------------------------------------


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

# --- what scores ----------------------------------------------------------------------------------


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


# --- where it runs --------------------------------------------------------------------------------


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

# --- training -------------------------------------------------------------------------------------


class LoraSettings(Settings):
    """Train a LoRA adapter instead of all weights."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    merge: bool = Field(False, description="save whole weights with the adapter merged in")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="of the frozen weights, by bitsandbytes (QLoRA)"
    )


class TrainConfig(Settings):
    """Fine-tuning on the ranks of each group's completions. Batches count groups."""

    objective: ObjectiveName = "rank_regression"
    tilt: TiltName | None = Field(
        None,
        description="what objectives of all ranks aim at; None: optimal, best_of_n for "
        "weighted_sft and in rounds",
    )
    n: float | None = Field(None, gt=1, le=LARGEST_N, description="aimed at; None: sampling.n")
    learning_rate: float = Field(5e-7, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(16, ge=1, description="groups a step, over all processes")
    gradient_accumulation_steps: int = Field(1, ge=1)
    alpha: float = Field(0.005, ge=0, le=1)
    beta: float = Field(0.1, gt=0, description="of the dpo and ipo baselines")
    delta: float = Field(4.0, gt=0, description="Huber's, in nats, of rank_regression_huber")
    optimizer: str = Field("adamw_torch", description="a transformers optimiser; paper: rmsprop")
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    lr_scheduler: str = "linear"
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(10.0, gt=0)
    seed: int = 0
    dtype: DType = Field("float32", description="of the trained weights")
    bf16: bool = Field(False, description="compute in bfloat16 (autocast)")
    gradient_checkpointing: bool = False
    share_prompt: bool | None = None
    logprobs: Literal["recompute", "sampled"] | None = Field(
        None,
        description="the base model's: computed anew before training, or those of the draws; "
        "None: anew where another engine drew",
    )
    max_batch_tokens: int | None = Field(None, ge=1, description="a pass; None: by the device")
    kl_budget: float | None = Field(
        None, gt=0, description="nats; go back towards the base until the measured KL is within it"
    )
    save_steps: int = Field(200, ge=1)
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="groups held out for the eval loss")
    eval_steps: int = Field(50, ge=1)
    early_stopping_patience: int | None = Field(None, ge=1)
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _early_stopping_needs_groups(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_fraction == 0:
            raise ValueError("early_stopping_patience needs an eval_fraction above 0")
        return self


class JudgeConfig(Settings):
    """A judge model behind an OpenAI-compatible endpoint."""

    model: str = Field(description="the name that the endpoint knows it by")
    base_url: str = Field("http://127.0.0.1:8000/v1", description="up to /chat/completions")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key, if one is set"
    )
    pairs: int = Field(1, ge=1, description="pairs a prompt, each judged in both orders")
    criteria: str = Field(
        "Which answer is more helpful, accurate and better written?",
        description="what the judge is asked to decide by",
    )
    max_tokens: int = Field(512, ge=1, description="of the judge's reply")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="more fields of the request; null leaves one out, as in "
        "{max_tokens: null, max_completion_tokens: 2000}",
    )
    timeout: float = Field(60.0, gt=0, description="seconds that a request may take")
    retries: int = Field(10, ge=0, description="of a request, with growing pauses up to a minute")
    concurrency: int = Field(8, ge=1, description="requests at a time")

    @model_validator(mode="after")
    def _extra_can_be_sent(self) -> Self:
        for name in sorted(self.extra.keys() & {"messages", "model", "stream"}):
            raise ValueError(
                f"extra: {name!r} cannot be set there; `model` names the model, and `criteria` is "
                "what you can say in the message"
            )
        try:
            json.dumps(self.extra, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"extra cannot be written as JSON ({error}); use texts, finite numbers, true, "
                "false, null, and lists and mappings of them"
            ) from error
        return self


class TextsConfig(Settings):
    """A file of texts, each in a row: JSONL, CSV, Parquet or text."""

    path: Path
    column: str = "text"
    limit: int | None = Field(None, ge=1)


class LMEvalConfig(Settings):
    """Tasks of lm-evaluation-harness, run on the base model and on every trained one."""

    tasks: list[str] = Field(min_length=1)
    include_path: Path | None = Field(None, description="a folder with tasks of your own")
    num_fewshot: int | None = Field(None, ge=0, description="None: as each task says")
    limit: int | None = Field(None, ge=1, description="examples a task; for trials only")
    batch_size: int = Field(8, ge=1)


class EvaluationConfig(Settings):
    """Measuring on held-out prompts."""

    prompts: PromptsConfig | None = Field(None, description="else `holdout` of the prompts")
    holdout: float = Field(0.2, gt=0, lt=1, description="held out when there are no own prompts")
    k: int = Field(8, ge=1, description="completions a prompt from each model")
    seed: int = 1
    rewards: dict[str, RewardConfig] = Field(
        default_factory=dict, description="further rewards, never trained on (a gold reward)"
    )
    metrics: dict[str, str] = Field(
        default_factory=dict, description="off-target metrics, each a package.module:function"
    )
    human_text: TextsConfig | None = Field(
        None, description="texts by people, whose perplexity shows what was forgotten"
    )
    judge: JudgeConfig | None = None
    lm_eval: LMEvalConfig | None = None
    max_batch_tokens: int | None = Field(None, ge=1, description="of the KL; None: by the device")
    bootstrap: int = Field(2000, ge=100, description="resamples for the 95% intervals")

    @model_validator(mode="after")
    def _column_names(self) -> Self:
        for key, names in (("rewards", self.rewards), ("metrics", self.metrics)):
            for name in names:
                # Our own columns, and what the report shows beside them.
                taken = name.startswith("kl") or name in ("reward", "tokens")
                if taken or not _is_name(name):
                    raise ValueError(f"{key}: {name!r} {_BAD_NAME}")
        own = sorted(self.metrics.keys() & OWN_METRICS)
        if own:
            raise ValueError(f"metrics: {own[0]!r} is measured anyway; call yours something else")
        both = sorted(self.rewards.keys() & self.metrics.keys())
        if both:
            raise ValueError(f"{both[0]!r} is both in rewards and in metrics; rename one")
        return self


class RunConfig(Settings):
    """Everything that defines a run."""

    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerConfig = TransformersSamplerConfig()
    reward: RewardConfig
    engine: EngineConfig = LocalEngineConfig()
    storage: str | None = Field(
        None,
        min_length=1,
        description="where samples and groups go: a folder or s3://…, gs://…, hdfs://…; None: the "
        "run's folder",
    )
    rounds: int = Field(
        1, ge=1, description="sample, score and train this often, each time from the last model"
    )
    train: TrainConfig = TrainConfig()
    baselines: dict[str, TrainConfig] = Field(
        default_factory=dict, description="further models, trained and measured beside"
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.sampling.n < 2:
            raise ValueError(
                "sampling.n: best-of-n against worst needs n >= 2; with n = 1 nothing is chosen"
            )
        by_likelihood = ("sft_bon", "weighted_sft")
        cut = [t.objective for t in self.trainings.values() if t.objective not in by_likelihood]
        if self.sampling.truncates and cut:
            raise ValueError(
                f"sampling.top_k and top_p cut the distribution that objective {cut[0]} compares "
                "the policy with; leave them out, or train with sft_bon or weighted_sft alone"
            )
        if self.model.device == "balanced" and self.sampler.name != "vllm":
            raise ValueError(
                "model.device: balanced spreads a model to measure it; what draws from one that "
                "is spread is sampler: vllm with tensor_parallel_size"
            )
        taken = {"base", f"best-of-{self.target_n}", self.model_name}
        for name in self.baselines:
            if name in taken or not is_policy_name(name):
                raise ValueError(f"baselines: {name!r} {_BAD_NAME}")
        return self

    @model_validator(mode="after")
    def _rounds_compose(self) -> Self:
        if self.rounds == 1:
            return self
        if self.train.lora is not None and not self.train.lora.merge:
            raise ValueError(
                "rounds start from the last round's whole weights; set train.lora.merge to true"
            )
        if self.train.kl_budget is not None:
            raise ValueError(
                "train.kl_budget would hold for each of the rounds and not for all of them; leave "
                "it out, or set rounds to 1"
            )
        if self.sampler.name == "openai":
            raise ValueError(
                "a round draws from the last one's model, which no server has; set sampler to "
                "transformers or vllm"
            )
        if self.train.tilt == "optimal":
            raise ValueError(
                "rounds compose for best-of-n (a best-of-a of a best-of-b) and not for the optimal "
                "tilt; leave train.tilt out"
            )
        return self

    @property
    def target_n(self) -> int:
        """The n of the best-of-n that models are measured beside: train.n, rounded up.

        The evaluation draws as many of each prompt, and k more, from the base model.
        """
        return max(2, math.ceil(self.train.n or self.sampling.n))

    @property
    def model_name(self) -> str:
        """The name of the trained model in tables: its objective."""
        return self.train.objective

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Every model to train, the main one last."""
        return {**self.baselines, self.model_name: self.train}


def round_config(config: RunConfig, number: int, base: Path | str) -> RunConfig:
    """The configuration of one of `rounds`, which starts from the model `base`.

    A best-of-a of a best-of-b is a best-of-ab, so each of k rounds aims at n^(1/k). The baselines
    belong to the first round.
    """
    n = (config.train.n or config.sampling.n) ** (1 / config.rounds)
    whole = round(n)
    n = whole if abs(n - whole) < 1e-9 else n  # 8^(1/3) is not 2 in floating point
    tilt = config.train.tilt or "best_of_n"
    seeds = {"seed": config.sampling.seed + number - 1}
    storage = config.storage and f"{config.storage.rstrip('/')}/round-{number}"
    return config.model_copy(
        update={
            "rounds": 1,
            "model": config.model.model_copy(update={"name": str(base)}),
            "sampling": config.sampling.model_copy(update=seeds),
            "train": config.train.model_copy(update={"n": n, "tilt": tilt}),
            "storage": storage,
            "baselines": config.baselines if number == 1 else {},
        }
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides (`train.learning_rate=1e-5`).

    Raises BonbonError naming the wrong key or value and what was expected.
    """
    return parse_config(read_yaml(path), overrides, source=str(path))


def parse_config(
    values: Any, overrides: Sequence[str] = (), source: str = "the configuration"
) -> RunConfig:
    """A checked configuration from plain values. Raises BonbonError as `load_config` does."""
    return parse_settings(RunConfig, values, overrides, source)
