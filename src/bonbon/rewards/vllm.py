"""A reward model run by vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from bonbon.config.reward import RewardConfig
from bonbon.config.sampling import VllmSettings
from bonbon.groups.group import Prompt
from bonbon.models.loading import load_pretrained
from bonbon.models.vllm_engine import Engine, device_type, dtype_name, import_vllm, model_place
from bonbon.rewards.model import reward_inputs
from bonbon.system.errors import BonbonError


class VllmRewardModel:
    """`RewardModel`, run by vLLM: a sequence-classification model with a single output.

    It reads the same tokens as `RewardModel`, and a reward is the model's output without a sigmoid.
    Models that mark the parts of a pair by token types (BERT) are an error.

    Args:
        config: names the model, safetensors only; vLLM batches by itself, so `max_batch_tokens` is
            not used.
        settings: how vLLM runs it, as in `VllmSampler`.

    Raises BonbonError when vLLM is not installed or cannot run the model.
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
            model=model_place(name),
            dtype=dtype_name(config.dtype, device_type(config.device)),
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
        """Return the token ids that the model reads for one completion."""
        row = reward_inputs(
            self.tokenizer, prompt, completion, self._longest, types=self._token_types
        )
        if any(row.get("token_type_ids", ())):
            raise BonbonError(
                "the reward model marks prompt and completion by token types, which vLLM does not "
                "get here; leave reward.vllm out"
            )
        return row["input_ids"]

    def close(self) -> None:
        """End the engine's processes, which frees their memory."""
        self.engine.close()


def _check_reward_model(name: str, config: Any) -> None:
    kinds = config.architectures or ()
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise BonbonError(
            f"reward model {name} is a {', '.join(kinds) or 'model of an unknown kind'}, not a "
            "sequence-classification model; choose one with a single output"
        )
    if config.num_labels != 1:
        raise BonbonError(
            f"the reward model {name} has {config.num_labels} outputs; a reward model has one"
        )
