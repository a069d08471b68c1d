"""A training with a KL budget ends within it, by the evaluation's own measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Groups
from bonbon.models.loading import load_policy
from bonbon.system.errors import BonbonError
from bonbon.training.kl_budget import KLBudgetCallback, KLMeter, MeasuredKL, base_of
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer
from support.training import random_group

BUDGET = 0.3


@pytest.fixture(scope="module")
def groups() -> Groups:
    generator = np.random.default_rng(0)
    return Groups([random_group(i, generator, list(generator.normal(size=4))) for i in range(32)])


def trainer_of(model: Path, out: Path, groups: Groups, **settings: Any) -> BoNBoNTrainer:
    peft_config = settings.pop("peft_config", None)
    values: dict[str, Any] = {
        "objective": "rank_regression",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "kl_prompts": 16,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    args = BoNBoNConfig(str(out), **(values | settings))
    return BoNBoNTrainer(str(model), args, train_dataset=groups, peft_config=peft_config)


def budget_of(trainer: BoNBoNTrainer) -> KLBudgetCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, KLBudgetCallback))


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_training_ends_within_the_budget(
    tiny_model: Path, groups: Groups, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """As far from the base as the budget lets it, and measurably so."""
    trainer = trainer_of(tiny_model, tmp_path, groups, kl_budget=BUDGET, peft_config=lora)
    trainer.train()
    budget = budget_of(trainer)
    final = budget.meter(trainer.model)
    assert final.within(BUDGET)
    assert final.value > 0.5 * BUDGET
    (whole_way, before), *_ = budget.history
    assert whole_way == 1
    assert before.value > BUDGET
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged == [kl.value for _, kl in budget.history]
    (share,) = [e["kl_budget_share"] for e in trainer.state.log_history if "kl_budget_share" in e]
    assert 0 < share < 1


def test_a_wide_budget_changes_nothing(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    def weights(**settings: Any) -> list[torch.Tensor]:
        trainer = trainer_of(tiny_model, tmp_path, groups, max_steps=8, **settings)
        trainer.train()
        return [value.detach() for value in trainer.model.parameters()]

    expected = weights()
    assert expected
    for free, bound in zip(expected, weights(kl_budget=1e6), strict=True):
        torch.testing.assert_close(free, bound, atol=0, rtol=0)


def test_the_base_stays_the_base(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, kl_budget=BUDGET)
    trainer.train()
    untouched, _ = load_policy(str(tiny_model), dtype="float32", device="cpu")
    expected = list(untouched.parameters())
    assert expected
    for ours, theirs in zip(budget_of(trainer).meter.base.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_an_adapter_s_base_shares_its_weights(tiny_model: Path) -> None:
    from peft import get_peft_model

    model, tokenizer = load_policy(str(tiny_model), dtype="float32", device="cpu")
    ids = torch.tensor([[1, 10, 11]])
    plain = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_()
        base = base_of(adapted)
        torch.testing.assert_close(base(input_ids=ids).logits, plain)
        assert (adapted(ids).logits - plain).abs().max() > 0.01
    assert not isinstance(base, torch.nn.Module)
    assert tokenizer is not None


def test_the_meter_is_zero_for_the_base_and_keeps_the_mode(tiny_model: Path) -> None:
    from bonbon.groups.prompts import EncodedPrompt

    model, tokenizer = load_policy(str(tiny_model), dtype="float32", device="cpu")
    prompts = [EncodedPrompt(f"p{i}", "", (1, 10 + i)) for i in range(4)]
    meter = KLMeter(base_of(model), tokenizer, prompts, SamplingConfig(n=2, max_new_tokens=5))
    model.train()
    assert meter(model).value == pytest.approx(0, abs=1e-6)
    assert model.training


def test_a_diverged_training_is_an_error(
    tiny_model: Path, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, kl_budget=BUDGET, max_steps=1)
    monkeypatch.setattr(KLMeter, "__call__", lambda *_: MeasuredKL(float("nan"), 0.0))
    with pytest.raises(BonbonError, match="diverged"):
        trainer.train()


def test_the_meter_draws_as_the_groups_were_drawn(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    drawn = Groups(groups, {"sampling": {"temperature": 0.7, "max_new_tokens": 21}})
    config = budget_of(trainer_of(tiny_model, tmp_path, drawn, kl_budget=BUDGET)).meter.config
    assert (config.temperature, config.max_new_tokens) == (0.7, 21)


def test_within_allows_for_the_standard_error() -> None:
    assert MeasuredKL(0.9, 0.05).within(1.0)
    assert not MeasuredKL(0.9, 0.06).within(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_budget": 0.0}, "kl_budget = 0.0: Input should be greater than 0"),
        ({"kl_budget": -1.0}, "kl_budget = -1.0: Input should be greater than 0"),
        (
            {"kl_budget": 1.0, "kl_samples": 0},
            "kl_samples = 0: Input should be greater than or equal to 1",
        ),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BonbonError, match=message):
        BoNBoNConfig(str(tmp_path), **settings)
