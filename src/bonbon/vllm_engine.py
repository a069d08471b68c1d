"""Drawing and scoring with vLLM's offline engine (extra `vllm`).

What is drawn is the same distribution as with `TransformersSampler`: nothing of the model's
`generation_config.json` but its end tokens, and log-probabilities with temperature, top-k and top-p
in them. The draws themselves differ, since vLLM has random numbers of its own: completion k of a
prompt has the seed `bonbon.streams.request_seed` + k. The same seed gives the same completions as
far as arithmetic goes; matrix products of other batch shapes may differ in the last bits, and where
a draw is that close, another token comes out.

vLLM starts processes that import the main module again, so a script of your own needs its
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config import (
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    VllmSamplerConfig,
    VllmSettings,
)
from bonbon.errors import BonbonError, first_line
from bonbon.files import read_json
from bonbon.groups import Group, Prompt
from bonbon.models import BALANCED, end_token_ids, load_pretrained, pick_dtype
from bonbon.prompts import EncodedPrompt, PromptRow
from bonbon.reward import reward_inputs
from bonbon.rows import completion_text
from bonbon.sampling import encode_prompts
from bonbon.streams import request_seed

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM sets memory aside for
_TEMPERATURES = (0.01, 2.0)  # vLLM raises a lower one to 0.01 and refuses a higher one
_WATCH_SECONDS = 1.0
_REASON = re.compile(r"\b(\w*(?:Error|Exception)): (.+)")

# --- the engine -----------------------------------------------------------------------------------


def import_vllm() -> Any:
    """The package, which then says errors alone. Raises BonbonError where it is not installed.

    `VLLM_LOGGING_LEVEL` in the environment shows more.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BonbonError("vLLM is not installed: pip install 'bonbon-align[vllm]'")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers what it runs
    try:
        with _own_output():
            import vllm
    except Exception as error:  # a build for another CUDA, say
        raise BonbonError(f"vLLM is installed but does not load: {_said(error)}") from error
    return vllm


@contextmanager
def _own_output() -> Iterator[IO[bytes] | None]:
    """Gives what is printed meanwhile, and by processes started meanwhile for good, a file.

    It holds why an engine did not start, which the exception in this process does not say. None,
    and nothing taken, where the user set vLLM's logging level.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield None
        return
    output = tempfile.TemporaryFile()  # noqa: SIM115 (the processes keep it)
    kept = [os.dup(1), os.dup(2)]
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        _point_at(output.fileno(), output.fileno())
        yield output
    finally:
        _point_at(*kept)
        for number in kept:
            os.close(number)
        del os.environ["VLLM_LOGGING_LEVEL"]


def _point_at(stdout: int, stderr: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


class Engine:
    """A running `vllm.LLM` and the processes behind it.

    Args:
        what: the model in words, for errors.
        settings: the user's.
        arguments: of `vllm.LLM`, ours.

    Raises BonbonError, with the reason that the engine's processes gave, when it does not start.
    """

    def __init__(self, what: str, settings: VllmSettings, **arguments: Any) -> None:
        vllm = import_vllm()
        self._what = what
        self._output: IO[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        earlier = multiprocessing.active_children()
        quiet = {"use_tqdm_on_load": False, "disable_log_stats": True}
        known = {**settings.model_dump(exclude={"engine", "name"}), **quiet, **arguments}
        _check_settings(settings, known)
        try:
            with _own_output() as self._output:
                self.llm = vllm.LLM(**known, **settings.engine)
        except Exception as error:  # of whatever kind: vLLM, torch, the driver
            raise BonbonError(
                f"vLLM cannot run {what}: {self._reason(error)} (VLLM_LOGGING_LEVEL=INFO shows "
                "all that it says)"
            ) from error
        self._guard = _guard_of(set(multiprocessing.active_children()) - set(earlier))

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Raises what goes wrong meanwhile as a BonbonError."""
        start = 0 if self._output is None else self._output.seek(0, os.SEEK_END)
        done = Event()
        Thread(target=self._watch, args=(done,), daemon=True).start()
        try:
            yield
        except Exception as error:
            raise BonbonError(
                f"vLLM failed while it ran {self._what}: {self._reason(error, start)}"
            ) from error
        finally:
            done.set()

    def _watch(self, done: Event) -> None:
        """Wakes vLLM (0.32) up, which waits for ever for what a killed process would have sent."""
        core = self.llm.llm_engine.engine_core
        resources = getattr(core, "resources", None)  # None where the engine has no processes
        while resources is not None and not done.wait(_WATCH_SECONDS):
            if resources.engine_dead:
                core.outputs_queue.put_nowait(RuntimeError("the engine is dead"))
                return

    def close(self) -> None:
        """End its processes, which frees their memory; a second call does nothing."""
        with suppress(Exception):  # one that has died is as good as closed
            self.llm.llm_engine.engine_core.shutdown()
        if self._guard is not None:
            self._guard.communicate(b"\n")
            self._guard = None

    def _reason(self, error: Exception, start: int = 0) -> str:
        """What went wrong: the first error that its processes report where they are to blame."""
        dead = type(error).__name__ == "EngineDeadError"
        if (dead or "root cause" in str(error)) and self._output is not None:
            self._output.seek(start)
            said = self._output.read().decode(errors="replace")
            if found := _REASON.search(said):
                return f"{found[1]}: {found[2]}"
        if dead:
            return "its process has ended, as when the machine runs out of memory"
        return _said(error)


def _guard_of(processes: Iterable[BaseProcess]) -> subprocess.Popen[bytes] | None:
    """A shell that ends an engine's processes when this one is killed.

    vLLM (0.32) would leave them, and with them the memory that the next try needs. The shell's
    input ends with this process; a line on it says that all is well.
    """
    pids = [str(process.pid) for process in processes]
    if not pids:
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r line || kill -9 "$@"', "sh", *pids],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # or Ctrl-C would end it first
    )


def _said(error: Exception) -> str:
    if isinstance(error, ValidationError):  # whose first line counts errors
        return error.errors()[0]["msg"]
    return first_line(error)


def _check_settings(settings: VllmSettings, known: dict[str, Any]) -> None:
    if settings.data_parallel_size > 1:
        raise BonbonError(
            f"data_parallel_size is {settings.data_parallel_size}, but vLLM's offline engine runs "
            "one copy of a model; leave it at 1 and have several samplers (engine: ray), or put a "
            "server behind sampler: openai (`vllm serve --data-parallel-size`)"
        )
    for name in sorted(settings.engine.keys() & known.keys()):
        raise BonbonError(
            f"engine.{name} of the vLLM settings cannot be set there; it is "
            + ("a setting of its own" if name in type(settings).model_fields else "BoNBoN's own")
        )


def _place(name: str) -> str:
    """A model's folder or hub id as vLLM takes it, which knows no `~`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _built_for(device: str) -> str:
    """The type of device that the installed vLLM runs on; BonbonError for another than `device`."""
    from vllm.platforms import current_platform

    built_for = str(current_platform.device_type)
    if device not in ("auto", BALANCED, built_for):
        raise BonbonError(
            f"device {device!r} cannot be had: the installed vLLM runs on {built_for!r}; leave "
            "device at auto, and choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    return built_for


def _dtype_name(dtype: str, device: str) -> str:
    return str(pick_dtype(dtype, torch.device(device))).removeprefix("torch.")


# --- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """Where a policy's weights are: a model, and an adapter over it where there is one."""

    model: str
    revision: str | None
    adapter: Path | None = None
    rank: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> _Weights:
        folder = Path(config.name).expanduser()
        if not (folder / "adapter_config.json").exists():
            return cls(_place(config.name), config.revision)
        if not (folder / "adapter_model.safetensors").exists():
            raise BonbonError(
                f"model {config.name}: the adapter has no safetensors weights; convert it"
            )
        adapter = read_json(folder / "adapter_config.json")
        rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
        if rank > _LORA_RANKS[-1]:
            raise BonbonError(
                f"model {config.name}: vLLM takes adapters up to rank {_LORA_RANKS[-1]}, and this "
                f"one has {rank}; merge it into its model"
            )
        base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
        return cls(base, revision, folder, rank)

    def arguments(self) -> dict[str, Any]:
        """What `vllm.LLM` is told of them."""
        named = {"model": self.model, "revision": self.revision}
        if self.adapter is None:
            return named
        rank = next(rank for rank in _LORA_RANKS if rank >= self.rank)
        return {**named, "enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


class VllmSampler:
    """Samples with vLLM's offline engine: a request a prompt, its n completions over one prefix.

    Prompts come in any number at once; vLLM batches by itself, so `config.max_batch_tokens` is not
    used (`settings.engine` may hold `max_num_seqs` and `max_num_batched_tokens`). Prompt and
    completion fit `settings.max_model_len`, or the context that vLLM takes from the model.

    Tensor and pipeline parallelism are `vllm.LLM`'s. It has no data parallelism offline (0.32
    refuses it outside torchrun), so `data_parallel_size` above 1 is an error; with `engine: ray`
    each sampler is a copy.

    Args:
        model: a model folder or hub id, or a LoRA adapter's folder, safetensors only. `auto` is
            float32 for vLLM's CPU build, else bfloat16.
        config: what to draw; temperatures from 0.01 to 2, vLLM's limits.
        settings: how vLLM runs it.
        stream: names the random stream, as in `TransformersSampler`.

    Raises BonbonError when vLLM is not there or cannot run the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: SamplingConfig,
        settings: VllmSamplerConfig,
        stream: str = "",
    ) -> None:
        _check_temperature(config.temperature)
        self.config = config
        self.settings = settings
        self.stream = stream
        vllm = import_vllm()
        weights = _Weights.of(model)
        device = _built_for(model.device)
        self._dtype = _dtype_name(model.dtype, device)
        self.tokenizer, self._ends = _tokenizer_and_ends(model, weights)
        self.engine = Engine(
            f"model {model.name}",
            settings,
            **weights.arguments(),
            dtype=self._dtype,
            trust_remote_code=model.trust_remote_code,
            load_format="safetensors",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            # A prompt read in parts takes its seed's generator back by a draw, which vLLM (0.32)
            # cannot do with those of CPUs: the engine would die.
            enable_chunked_prefill=device != "cpu",
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
        )
        self._version = str(vllm.__version__)
        self._adapter = None if weights.adapter is None else self._with_adapter(weights.adapter)

    def _with_adapter(self, folder: Path) -> Any:
        """The adapter, loaded: an error then does not take the engine down with it later."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, str(folder))
        try:
            self.engine.llm.llm_engine.add_lora(adapter)
        except Exception as error:
            self.close()
            raise BonbonError(
                f"vLLM cannot use the adapter {folder}: {_said(error)}; merge it into its "
                "model (train.lora.merge: true)"
            ) from error
        return adapter

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """See `Sampler.encode`."""
        return encode_prompts(
            rows,
            self.tokenizer,
            max_tokens=self.engine.max_model_len - self.config.max_new_tokens,
            on_long_prompt=self.config.on_long_prompt,
        )

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        """See `Sampler.sample`; progress comes with each prompt whose n completions are done."""
        self._check(prompts)
        with self.engine.at_work():
            outputs = self._run(prompts, progress)
        return [self._group(*pair) for pair in zip(prompts, outputs, strict=True)]

    def described(self) -> dict[str, Any]:
        """See `Sampler.described`."""
        settings = self.settings
        return {
            "sampler": "vllm",
            "vllm": self._version,
            "dtype": self._dtype,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "engine": dict(settings.engine),
        }

    def close(self) -> None:
        """See `Sampler.close`."""
        self.engine.close()

    def _check(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Refuses what vLLM would answer with shorter completions or by dying."""
        room = self.engine.max_model_len - self.config.max_new_tokens
        for prompt in prompts:
            if len(prompt.token_ids) > room:
                raise BonbonError(
                    f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens, but the context"
                    f" of {self.engine.max_model_len} leaves {room} beside max_new_tokens; shorten "
                    "it or lower max_new_tokens"
                )
            if max(prompt.token_ids) >= self.engine.vocabulary:
                raise BonbonError(
                    f"prompt {prompt.prompt_id} has token {max(prompt.token_ids)}, and the model "
                    f"{self.engine.vocabulary} tokens; tokenizer and model do not belong together"
                )

    def _run(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None
    ) -> list[Any]:
        """vLLM's outputs, in the order of the prompts."""
        llm, outputs = self.engine.llm, []
        asked = llm.enqueue(
            [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts],
            [self._parameters(prompt) for prompt in prompts],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        try:
            while llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    outputs.append(output)
                    if progress is not None:
                        progress(sum(len(one.token_ids) for one in output.outputs))
        except BaseException:  # a stop by the user too, after which the engine may be used again
            with suppress(Exception):
                llm.llm_engine.abort_request(asked, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _parameters(self, prompt: EncodedPrompt) -> Any:
        from vllm import SamplingParams

        config = self.config
        return SamplingParams(
            n=config.n,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=request_seed(config.seed, self.stream, prompt.prompt_id),
            ignore_eos=True,  # all the ends are in our own list
            stop_token_ids=list(self._ends),
            logprobs=0,  # the drawn token's alone
            detokenize=False,
        )

    def _group(self, prompt: EncodedPrompt, output: Any) -> Group:
        ids = tuple(tuple(one.token_ids) for one in output.outputs)
        logprobs = tuple(float(one.cumulative_logprob) for one in output.outputs)
        if not all(map(math.isfinite, logprobs)):
            raise BonbonError(
                "the model's next-token probabilities are not finite; its weights overflow in this "
                "dtype (try model.dtype=float32)"
            )
        return Group(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            prompt_token_ids=prompt.token_ids,
            completions=tuple(
                completion_text(self.tokenizer, prompt.token_ids, drawn) for drawn in ids
            ),
            token_ids=ids,
            logprobs=logprobs,
            finish_reasons=tuple(
                "stop" if drawn and drawn[-1] in self._ends else "length" for drawn in ids
            ),
        )


def _check_temperature(temperature: float) -> None:
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise BonbonError(
            f"vLLM draws at temperatures from {low} to {high}, and sampling.temperature is "
            f"{temperature}; for greedy draws set sampling.top_k to 1"
        )


def _tokenizer_and_ends(model: ModelConfig, weights: _Weights) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer, and the tokens that end a completion, as `load_policy` would find them."""
    trust = {"trust_remote_code": model.trust_remote_code}
    tokenizer = load_pretrained(
        AutoTokenizer, "tokenizer of", model.name, revision=model.revision, **trust
    )
    config = load_pretrained(AutoConfig, "model", weights.model, revision=weights.revision, **trust)
    try:
        generation = GenerationConfig.from_pretrained(weights.model, revision=weights.revision)
    except OSError:  # it has none
        generation = None
    described: Any = SimpleNamespace(config=config, generation_config=generation)
    return tokenizer, end_token_ids(described, tokenizer)


# --- scoring --------------------------------------------------------------------------------------


class VllmRewardModel:
    """`RewardModel`, run by vLLM: a sequence-classification model with a single output.

    It reads the very tokens that `RewardModel` reads, and a reward is the output as it is, without
    a sigmoid. Models that tell a pair's parts apart by token types (BERT) are an error.

    Args:
        config: names the model, safetensors only; vLLM batches by itself, so `max_batch_tokens` is
            not used.
        settings: how vLLM runs it; `data_parallel_size` as in `VllmSampler`.

    Raises BonbonError when vLLM is not there or cannot run the model.
    """

    def __init__(self, config: RewardConfig, settings: VllmSettings) -> None:
        import_vllm()
        name = config.model or ""
        shared = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        model = load_pretrained(AutoConfig, "reward model", name, **shared)
        _check_reward_model(name, model)
        self.tokenizer = load_pretrained(AutoTokenizer, "tokenizer of", name, **shared)
        self._token_types = getattr(model, "type_vocab_size", 1) > 1
        positions = getattr(model, "max_position_embeddings", None)
        self.engine = Engine(
            f"reward model {name}",
            settings,
            model=_place(name),
            dtype=_dtype_name(config.dtype, _built_for(config.device)),
            load_format="safetensors",
            runner="pooling",
            convert="classify",
            **shared,
        )
        self._longest = min(positions or self.engine.max_model_len, self.engine.max_model_len)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        rows = [self.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        if not rows:
            return np.empty(0)
        from vllm import PoolingParams

        with self.engine.at_work():
            outputs = self.engine.llm.encode(
                [{"prompt_token_ids": row} for row in rows],
                pooling_params=PoolingParams(use_activation=False),
                pooling_task="classify",
                use_tqdm=False,
            )
        return np.array([output.outputs.data.double().item() for output in outputs])

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """The token ids that the model reads for one completion."""
        row = reward_inputs(
            self.tokenizer, prompt, completion, self._longest, types=self._token_types
        )
        if any(row.get("token_type_ids", ())):
            raise BonbonError(
                "the reward model tells prompt and completion apart by token types, which vLLM is "
                "not given here; leave reward.vllm out"
            )
        return row["input_ids"]

    def close(self) -> None:
        """End the engine's processes, which frees their memory."""
        self.engine.close()


def _check_reward_model(name: str, config: Any) -> None:
    kinds = config.architectures or ()
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise BonbonError(
            f"reward model {name} is a {', '.join(kinds) or 'model of no stated kind'}, and no "
            "sequence-classification model"
        )
    if config.num_labels != 1:
        raise BonbonError(
            f"the reward model {name} has {config.num_labels} outputs; a reward model has one"
        )
