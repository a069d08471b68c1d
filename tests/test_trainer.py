"""The trainer minimises the objective it names, on exactly the tokens that were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, LlamaForCausalLM

from bonbon.batching import pad_rows
from bonbon.errors import BonbonError
from bonbon.groups import Group, Groups
from bonbon.logprobs import (
    completion_log_probs,
    shared_prompt_log_probs,
    shared_prompt_rows,
    supports_shared_prompt,
)
from bonbon.models import load_policy
from bonbon.objectives import OBJECTIVES, bonbon
from bonbon.trainer import BoNBoNConfig, BoNBoNTrainer
from conftest import EOS, group_of

N = 4


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


@pytest.fixture(scope="module")
def groups() -> Groups:
    generator = np.random.default_rng(0)
    return Groups([random_group(i, generator, list(generator.normal(size=N))) for i in range(16)])


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
    return BoNBoNTrainer(str(model), args, train_dataset=groups, **further)


def weights(trainer: BoNBoNTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


# --- log-probabilities ----------------------------------------------------------------------------


def one_by_one(model: LlamaForCausalLM, prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.detach().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())


def test_the_prompt_computed_once_gives_the_same_numbers_and_gradients(
    tiny_model: Path, groups: Groups
) -> None:
    model, _ = load_policy(str(tiny_model), device="cpu")
    prompts = [group.prompt_token_ids for group in groups]
    segments = [[group.token_ids[j] for group in groups] for j in range(3)]
    rows = pad_rows(prompts * 3, [ids for segment in segments for ids in segment], 0)
    padded = completion_log_probs(model, rows).view(3, -1)
    shared = shared_prompt_log_probs(model, shared_prompt_rows(prompts, segments, 0), torch.float32)
    torch.testing.assert_close(shared, padded, atol=1e-4, rtol=0)
    plain = [
        [one_by_one(model, g.prompt_token_ids, g.token_ids[j]) for g in groups] for j in (0, 2)
    ]
    torch.testing.assert_close(
        shared[[0, 2]].double(), torch.tensor(plain).double(), atol=1e-3, rtol=0
    )
    mixture = torch.linspace(-1, 1, padded.numel()).view_as(padded)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((shared * mixture).sum(), parameters)
    theirs = torch.autograd.grad((padded * mixture).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompt", [False, True, None])
def test_the_loss_is_the_objective_of_best_and_worst(
    tiny_model: Path, groups: Groups, tmp_path: Path, share_prompt: bool | None
) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, share_prompt=share_prompt, alpha=0.1)
    batch = trainer.data_collator(trainer.selection.pairs)
    loss = trainer.compute_loss(trainer.model, batch).detach()
    policy = {}
    for name, pick in (("best", np.argmax), ("worst", np.argmin)):
        indices = [int(pick(group.rewards)) for group in groups]
        pairs = list(zip(groups, indices, strict=True))
        policy[name] = [
            one_by_one(trainer.model, g.prompt_token_ids, g.token_ids[i]) for g, i in pairs
        ]
        policy[f"ref_{name}"] = [g.logprobs[i] for g, i in pairs]
    arguments = {name: torch.tensor(values).double() for name, values in policy.items()}
    expected = bonbon(**arguments, n=N, alpha=0.1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_trains_and_its_loss_falls(
    tiny_model: Path, groups: Groups, tmp_path: Path, objective: str
) -> None:
    trainer = trainer_of(
        tiny_model, tmp_path, groups, objective=objective, num_train_epochs=6, learning_rate=3e-3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert "sft_loss" in trainer.state.log_history[0]
    assert ("margin" in trainer.state.log_history[0]) == (objective != "sft_bon")


def test_accumulated_batches_train_as_one_large_batch(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    # Plain steps without clipping, which would hide a gradient of the wrong size.
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-6, "max_grad_norm": 1e9}
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    large = trainer_of(tiny_model, tmp_path / "a", groups, **plain)
    small = trainer_of(tiny_model, tmp_path / "b", groups, **plain, **split)
    before = weights(large)
    large.train()
    small.train()
    after = weights(large)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-5
    assert_same(after, weights(small), atol=0.02 * moved)


def test_gradient_checkpointing_changes_nothing(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    plain = trainer_of(tiny_model, tmp_path / "a", groups)
    checkpointed = trainer_of(tiny_model, tmp_path / "b", groups, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert_same(weights(plain), weights(checkpointed), atol=1e-6)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, bf16=True)
    trainer.train()
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}


def test_training_goes_on_from_a_checkpoint(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    whole = trainer_of(tiny_model, tmp_path, groups, **settings)
    whole.train()
    resumed = trainer_of(tiny_model, tmp_path, groups, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(weights(whole), weights(resumed), atol=1e-6)


def test_lora_trains_an_adapter_alone(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(tiny_model, tmp_path, groups, peft_config=lora)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not value.equal(before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_early_stopping_on_held_out_groups(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        groups,
        eval_dataset=groups[:4],
        learning_rate=0.3,  # far too large: the held-out loss must rise
        num_train_epochs=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step < trainer.state.max_steps
    assert any("eval_margin" in entry for entry in trainer.state.log_history)


# --- what it takes, and refuses -------------------------------------------------------------------


def test_the_temperature_is_the_groups_own(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    cooled = Groups(groups, {"sampling": {"temperature": 0.7}})
    assert trainer_of(tiny_model, tmp_path, cooled).temperature == 0.7
    assert trainer_of(tiny_model, tmp_path, list(groups)).temperature == 1.0
    with pytest.raises(BonbonError, match=r"drawn at temperature 0\.7, not 1\.0"):
        trainer_of(tiny_model, tmp_path, cooled, temperature=1.0)


def test_groups_of_a_cut_distribution_train_by_likelihood_alone(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    cut = Groups(groups, {"sampling": {"temperature": 1.0, "top_p": 0.9, "top_k": 0}})
    with pytest.raises(BonbonError, match="cut distribution that the policy does not have"):
        trainer_of(tiny_model, tmp_path, cut)
    trainer_of(tiny_model, tmp_path, cut, objective="sft_bon")


def test_dropout_is_off_but_an_adapter_s_own(groups: Groups, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    lora = LoraConfig(
        r=2,
        lora_dropout=0.25,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    args = BoNBoNConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = BoNBoNTrainer(GPT2LMHeadModel(config), args, groups, peft_config=lora)
    rates = {
        name: module.p
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert {rate for name, rate in rates.items() if "lora" not in name} == {0.0}
    assert {rate for name, rate in rates.items() if "lora" in name} == {0.25}
    trainer.model.train()
    batch = trainer.data_collator(trainer.selection.pairs)
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_models_with_local_attention_do_not_share_the_prompt() -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16}
    neo = GPTNeoConfig(
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        **sizes,
    )
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    mistral = MistralConfig(intermediate_size=16, sliding_window=8, **heads, **sizes)
    assert not supports_shared_prompt(GPTNeoForCausalLM(neo))
    assert not supports_shared_prompt(MistralForCausalLM(mistral))
    whole = MistralConfig(intermediate_size=16, sliding_window=None, **heads, **sizes)
    assert supports_shared_prompt(MistralForCausalLM(whole))


def test_tied_groups_are_dropped_and_counted(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    tied = random_group(99, np.random.default_rng(1), [0.5] * N)
    trainer = trainer_of(tiny_model, tmp_path, [*groups, tied])
    assert trainer.selection.tied == 1
    assert len(trainer.train_dataset) == len(groups)


def test_a_datasets_dataset_of_group_rows(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([group.to_row() for group in groups])
    trainer = trainer_of(tiny_model, tmp_path, rows)
    assert trainer.selection == trainer_of(tiny_model, tmp_path, groups).selection


def test_n_must_be_the_groups_own(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match="disagree on n"):
        trainer_of(tiny_model, tmp_path, groups, n=8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "ppo"}, "unknown objective 'ppo'"),
        ({"alpha": 1.5}, "alpha must lie"),
        ({"beta": 0.0}, "beta must be positive"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BonbonError, match=message):
        BoNBoNConfig(str(tmp_path), **setting)
