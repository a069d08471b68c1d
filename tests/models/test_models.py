"""A model whose layers lie on several devices is measured as one that lies on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from transformers import PreTrainedModel

from bonbon.config.sampling import SamplingConfig
from bonbon.evaluation import completion_kls, human_text
from bonbon.models import loading as models
from bonbon.models import logprobs
from bonbon.models.loading import load_policy
from bonbon.models.logprobs import completion_log_probs
from bonbon.models.padding import pad_rows
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError
from support.models import build_tiny_model
from support.training import random_group


@pytest.fixture
def spread(tiny_model: Path, tmp_path: Path) -> PreTrainedModel:
    """The tiny model with its last layer and head on another "device", read from disk when used."""
    model, _ = load_policy(str(tiny_model), device="cpu")
    layers = len(model.model.layers)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(layers - 1)}
    places |= {f"model.layers.{layers - 1}": "disk", "lm_head": "disk"}
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True
    )


def test_balanced_is_one_device_where_there_is_one(tiny_model: Path) -> None:
    model, tokenizer = load_policy(str(tiny_model), device="balanced")
    expected, _ = load_policy(str(tiny_model), device="cpu")
    if torch.accelerator.is_available():
        pytest.skip("that there is no accelerator is what is tested")
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not model.training
    sampler = TransformersSampler(model, tokenizer, SamplingConfig(n=2, max_new_tokens=4))
    assert sampler.sample(sampler.encode([]), None) == []


def test_a_spread_model_is_measured_as_it_is_in_one_place(
    tiny_model: Path, spread: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = load_policy(str(tiny_model), device="cpu")
    other, _ = load_policy(str(build_tiny_model(tmp_path / "other", seed=3)), device="cpu")
    generator = np.random.default_rng(0)
    groups = [random_group(i, generator, [0.0, 1.0]) for i in range(4)]
    assert completion_kls(spread, other, groups) == completion_kls(whole, other, groups)
    assert completion_kls(other, spread, groups) == completion_kls(other, whole, groups)
    rows = pad_rows([g.prompt_token_ids for g in groups], [g.token_ids[0] for g in groups], 0)
    monkeypatch.setattr(logprobs, "_LOGITS", 1)  # else the batch is too small for chunks
    monkeypatch.setattr(logprobs, "_CPU_LOGITS", 2000)
    with torch.no_grad():
        torch.testing.assert_close(
            completion_log_probs(spread, rows), completion_log_probs(whole, rows)
        )
    remove_hook_from_module(spread, recurse=True)


def test_no_more_logits_are_made_at_once_than_of_kls(
    tiny_model: Path, spread: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spread model's are all made at once, so its batches of texts must be small."""
    whole, tokenizer = load_policy(str(tiny_model), device="cpu")
    monkeypatch.setattr("bonbon.evaluation.kl._LOGITS", 20 * 259)
    made = []
    hook = spread.register_forward_hook(lambda *seen: made.append(seen[-1].logits.shape))
    texts = ["one text", "and one more", "3", "four"] * 3
    found = human_text.human_text_losses(spread, tokenizer, texts)
    hook.remove()
    assert len(made) > 3
    assert max(rows * columns for rows, columns, _ in made) <= 20
    np.testing.assert_allclose(
        found.nats, human_text.human_text_losses(whole, tokenizer, texts).nats, rtol=1e-5
    )


def test_a_spread_model_is_not_drawn_from(tiny_model: Path, spread: PreTrainedModel) -> None:
    _, tokenizer = load_policy(str(tiny_model), device="cpu")
    with pytest.raises(BonbonError, match="on one device; to spread one over several, use"):
        TransformersSampler(spread, tokenizer, SamplingConfig())


def test_what_accelerators_do_not_hold_is_refused(spread: PreTrainedModel) -> None:
    with pytest.raises(BonbonError, match="model big does not fit this machine's accelerators"):
        models._check_fits(spread, "big", torch.device("cuda"))
    models._check_fits(spread, "big", torch.device("cpu"))
    spread.hf_device_map = {"a": 0, "b": 1}
    models._check_fits(spread, "big", torch.device("cuda"))
