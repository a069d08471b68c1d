"""The base model's log-probabilities, computed anew before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bonbon.groups.group import Groups
from bonbon.models.loading import load_policy
from bonbon.system.errors import BonbonError
from bonbon.training.reference_logprobs import FILE, wants_recomputing
from bonbon.training.trainer import BoNBoNTrainer
from support.training import assert_same, one_by_one, random_group, trainer_of, weights

N = 3
# Not Adam, which makes steps of one size of gradients that are rounding errors.
SETTINGS = {"optim": "sgd", "learning_rate": 1e-4, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def drawn_elsewhere() -> Groups:
    """Groups whose log-probabilities are far from the model's."""
    generator = np.random.default_rng(3)
    groups = [random_group(i, generator, list(generator.normal(size=N))) for i in range(10)]
    return Groups(groups, {"sampler": "vllm"})


@pytest.fixture(scope="module")
def right(tiny_model: Path, drawn_elsewhere: Groups) -> Groups:
    """The same groups with the model's own log-probabilities, each computed alone."""
    model, _ = load_policy(str(tiny_model), device="cpu")
    return Groups(
        [
            replace(
                group,
                logprobs=tuple(
                    one_by_one(model, group.prompt_token_ids, ids) for ids in group.token_ids
                ),
            )
            for group in drawn_elsewhere
        ]
    )


def trained(model: Path, out: Path, groups: Groups, **settings: Any) -> BoNBoNTrainer:
    trainer = trainer_of(model, out, groups, **(SETTINGS | settings))
    trainer.train()
    return trainer


def test_groups_of_another_engine_train_like_groups_of_our_own(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups, right: Groups
) -> None:
    expected = trained(tiny_model, tmp_path / "a", right, logprobs="sampled")
    found = trained(tiny_model, tmp_path / "b", drawn_elsewhere, eval_dataset=drawn_elsewhere)
    for dataset in (found.train_dataset, found.eval_dataset):
        for group, own in zip(dataset, expected.train_dataset, strict=True):
            assert group.ref_logps == pytest.approx(own.ref_logps, abs=1e-4)
    # The first loss is that of a policy that is its own reference.
    losses = [trainer.state.log_history[0]["loss"] for trainer in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(weights(found), weights(expected), atol=1e-5)
    other = trained(tiny_model, tmp_path / "c", drawn_elsewhere, logprobs="sampled")
    with pytest.raises(AssertionError):
        assert_same(weights(other), weights(expected), atol=1e-5)


def test_a_training_that_goes_on_has_the_log_probabilities_of_its_start(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = trained(tiny_model, tmp_path / "a", drawn_elsewhere, **settings)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    again = trainer_of(tiny_model, tmp_path / "a", drawn_elsewhere, **SETTINGS, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(again), weights(whole), atol=1e-6)
    (tmp_path / "a" / FILE).write_bytes(b"torn")
    with pytest.raises(BonbonError, match=r"reference_logps\.safetensors.*without the checkpoint"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_still_compares_with_the_base_model(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    trainer = trained(tiny_model, tmp_path, drawn_elsewhere)
    before = [group.ref_logps for group in trainer.train_dataset]
    trainer.train()
    assert [group.ref_logps for group in trainer.train_dataset] == before


def test_an_evaluation_before_the_training_has_them_too(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups, right: Groups
) -> None:
    found, expected = (
        trainer_of(tiny_model, tmp_path, groups, eval_dataset=groups, **SETTINGS).evaluate()
        for groups in (drawn_elsewhere, right)
    )
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_groups_in_another_order_are_other_groups(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tiny_model, tmp_path / "a", drawn_elsewhere, **settings)
    turned = Groups(list(drawn_elsewhere)[::-1], drawn_elsewhere.provenance)
    again = trainer_of(tiny_model, tmp_path / "a", turned, **SETTINGS, **settings)
    with pytest.raises(BonbonError, match="belongs to other groups"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_objectives_that_do_not_compare_need_none(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    trained(tiny_model, tmp_path, drawn_elsewhere, objective="sft_bon")
    assert not (tmp_path / FILE).exists()


def test_no_engine_s_dtype_rounds_what_is_compared(
    tiny_model: Path, tmp_path: Path, right: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed in bfloat16 would have it."""
    trainer = trainer_of(tiny_model, tmp_path, right)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer), "is_deepspeed_enabled", True, raising=False)
    trainer.is_deepspeed_enabled = True
    trainer.accelerator.state.__dict__["deepspeed_plugin"] = plugin
    part = next(iter(trainer.get_train_dataloader()))["parts"][0]
    prepared = trainer._prepare_inputs(part)
    assert part
    for name, tensor in part.items():
        assert prepared[name].dtype == tensor.dtype, name
        assert torch.equal(prepared[name], tensor), name


def test_the_kept_ones_are_not_taken_for_those_of_other_groups(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tiny_model, tmp_path / "a", drawn_elsewhere, **settings)
    fewer = trainer_of(tiny_model, tmp_path / "a", drawn_elsewhere[:6], **SETTINGS, **settings)
    with pytest.raises(BonbonError, match="belongs to other groups"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("asked", "provenance", "wanted"),
    [
        (None, {}, False),
        (None, {"sampler": "transformers"}, False),
        (None, {"sampler": "vllm"}, True),
        (None, {"sampler": "openai"}, True),
        ("sampled", {"sampler": "vllm"}, False),
        ("recompute", {}, True),
    ],
)
def test_when_they_are_computed_anew(
    asked: str | None, provenance: dict[str, str], wanted: bool
) -> None:
    assert wants_recomputing(asked, provenance) is wanted


def test_unknown_log_probabilities_are_refused_where_they_are_compared(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    nan = (float("nan"),) * N
    unknown = Groups([replace(group, logprobs=nan) for group in drawn_elsewhere])
    with pytest.raises(BonbonError, match=r"10 prompts \(g0, …\) have no log-probabilities"):
        trainer_of(tiny_model, tmp_path, unknown)
    trainer_of(tiny_model, tmp_path, unknown, objective="sft_bon")
    found = trained(tiny_model, tmp_path, unknown, logprobs="recompute")
    assert all(value.isfinite().all() for value in weights(found).values())


def test_completions_without_tokens_are_refused(
    tiny_model: Path, tmp_path: Path, drawn_elsewhere: Groups
) -> None:
    served = replace(drawn_elsewhere[0], token_ids=((-1, -1),) * N)
    with pytest.raises(BonbonError, match="g0 have texts but no tokens"):
        trainer_of(tiny_model, tmp_path, [served])


def test_a_wrong_word_is_refused(tiny_model: Path, tmp_path: Path, right: Groups) -> None:
    expected = "logprobs = 'anew': Input should be 'recompute' or 'sampled'"
    with pytest.raises(BonbonError, match=expected):
        trainer_of(tiny_model, tmp_path, right, logprobs="anew")
    assert torch.is_grad_enabled()
