"""Groups to train on, trainers of them, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bonbon.groups.group import Group
from bonbon.models.loading import load_policy
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer
from support.groups import group_of
from support.models import EOS


@lru_cache
def loaded(model: str) -> Any:
    return load_policy(model, device="cpu")


def random_group(index: int, generator: np.random.Generator, rewards: list[float]) -> Group:
    """Completions of different lengths, some of them cut off before an end token."""

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(3, 259, length).tolist())

    lengths = generator.integers(1, 9, len(rewards))
    finished = generator.random(len(rewards)) < 0.5
    ids = [tokens(n) + (EOS,) * int(f) for n, f in zip(lengths, finished, strict=True)]
    return group_of(
        f"g{index}",
        completions=["x"] * len(rewards),
        prompt_token_ids=tokens(int(generator.integers(1, 12))),
        token_ids=tuple(ids),
        logprobs=tuple(generator.normal(-20, 3, len(rewards)).tolist()),
        rewards=tuple(rewards),
    )


def trainer_of(model: Any, out: Path, groups: Any, **settings: Any) -> BoNBoNTrainer:
    further = {
        name: settings.pop(name)
        for name in ("peft_config", "eval_dataset", "callbacks")
        if name in settings
    }
    values: dict[str, Any] = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = BoNBoNConfig(str(out), **(values | settings))
    policy, tokenizer = loaded(str(model))
    return BoNBoNTrainer(copy.deepcopy(policy), args, groups, processing_class=tokenizer, **further)


def weights(trainer: BoNBoNTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def one_by_one(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
