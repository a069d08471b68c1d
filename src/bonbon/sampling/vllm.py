"""Draw completions with vLLM's offline engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import ModelConfig, SamplingConfig, VllmSamplerConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.loading import end_token_ids, load_pretrained
from bonbon.models.vllm_engine import (
    Engine,
    device_type,
    dtype_name,
    error_message,
    import_vllm,
    model_place,
)
from bonbon.sampling.completion_text import completion_text
from bonbon.sampling.encoding import prompt_room, prompts_for
from bonbon.sampling.random_streams import request_seed
from bonbon.system.atomic_files import read_json
from bonbon.system.errors import BonbonError

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM sets memory aside for


_TEMPERATURES = (0.01, 2.0)  # vLLM raises a lower one to 0.01 and refuses a higher one


@dataclass(frozen=True)
class _Weights:
    """The folders of a policy's weights: a model, and an adapter over it where there is one."""

    model: str
    revision: str | None
    adapter: Path | None = None
    rank: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> _Weights:
        folder = Path(config.name).expanduser()
        if not (folder / "adapter_config.json").exists():
            return cls(model_place(config.name), config.revision)
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
        """Return what `vllm.LLM` is told of them."""
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
    refuses it outside torchrun), so `engine.data_parallel_size` is an error; with `engine: ray`
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
        device = device_type(model.device)
        self._dtype = dtype_name(model.dtype, device)
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
                f"vLLM cannot use the adapter {folder}: {error_message(error)}; merge it into its "
                "model (train.lora.merge: true)"
            ) from error
        return adapter

    def encode(self, rows: Sequence[PromptRow]) -> list[EncodedPrompt]:
        """See `Sampler.encode`."""
        return list(prompts_for(rows, self.tokenizer, self.engine.max_model_len, self.config))

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
        room = prompt_room(self.engine.max_model_len, self.config)
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
