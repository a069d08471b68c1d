"""QLoRA: an adapter trains on quantised weights; what would mislead is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from bonbon.config.run import parse_config
from bonbon.groups.group import Groups
from bonbon.models import loading as models
from bonbon.models.loading import load_policy
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import train as training
from bonbon.system.errors import BonbonError
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer
from support.models import byte_tokenizer, tiny_llama_config
from support.training import random_group


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a size that four bits are packed for on a CPU."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_llama_config(hidden_size=64, intermediate_size=128)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def groups() -> Groups:
    generator = np.random.default_rng(0)
    return Groups([random_group(i, generator, list(generator.normal(size=4))) for i in range(8)])


def quantized_trainer(
    model: Path, groups: Groups, out: Path, quantization: Any, **settings: Any
) -> BoNBoNTrainer:
    policy, tokenizer = load_policy(
        str(model), dtype="float32", device="cpu", quantization=quantization
    )
    args = BoNBoNConfig(
        str(out), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-3,
        num_train_epochs=6, logging_steps=1, save_strategy="no", **settings,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return BoNBoNTrainer(policy, args, groups, processing_class=tokenizer, peft_config=lora)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_trains_on_quantised_weights(
    model: Path, groups: Groups, tmp_path: Path, quantization: str
) -> None:
    """Which stay as they are; the adapter goes onto the whole weights as well."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    trainer = quantized_trainer(model, groups, tmp_path, quantization)
    dtypes = {value.dtype for name, value in trainer.model.named_parameters() if "proj" in name}
    assert dtypes & {torch.uint8, torch.int8}
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name for name, value in trainer.model.named_parameters() if not value.equal(before[name])
    }
    assert moved == {name for name in before if "lora_" in name}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    adapted, _ = load_policy(str(tmp_path / "adapter"), device="cpu")
    carried = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert len(carried) == len(moved)
    for name, value in carried.items():
        assert value.equal(trainer.model.get_parameter(f"base_model.model.{name}"))


def test_a_kl_budget_is_refused(model: Path, groups: Groups, tmp_path: Path) -> None:
    """It would be measured from the quantised model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(BonbonError, match="kl_budget would measure from the quantised weights"):
        quantized_trainer(model, groups, tmp_path, "int8", kl_budget=1.0)


def test_without_bitsandbytes_it_says_what_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(BonbonError, match="nf4 needs bitsandbytes; `pip install bitsandbytes`"):
        load_policy(str(model), device="cpu", quantization="nf4")


def test_an_adapter_is_not_merged_into_quantised_weights(tmp_path: Path, model: Path) -> None:
    config = parse_config(
        {
            "model": {"name": str(model)},
            "prompts": {"path": str(tmp_path / "prompts.txt")},
            "reward": {"function": "json:dumps"},
            "train": {"lora": {"quantization": "nf4", "merge": True}},
        }
    )
    with pytest.raises(BonbonError, match=r"set train\.lora\.merge to false"):
        training.check_trainings(RunFolder(tmp_path / "out", config))
