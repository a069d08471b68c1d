"""The trainer minimises the objective it names, on exactly the tokens that were drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback

from bonbon.config.training import TrainConfig
from bonbon.groups.group import Group, Groups
from bonbon.models.group_logprobs import group_rows, sharing_pays
from bonbon.models.loading import load_policy
from bonbon.objectives.catalogue import OBJECTIVES, GroupLogps, ObjectiveSettings, group_metrics
from bonbon.system.errors import BonbonError, DivergedError
from bonbon.tilt.best_of_n import BestOfN, WorstOfN
from bonbon.tilt.exponential import ExponentialTilt, optimal_kl
from bonbon.training.batches import deal
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer
from support.groups import group_of
from support.training import assert_same, one_by_one, random_group, trainer_of, weights

N = 4


@pytest.fixture(scope="module")
def groups() -> Groups:
    generator = np.random.default_rng(0)
    return Groups([random_group(i, generator, list(generator.normal(size=N))) for i in range(16)])


def batch_of(trainer: BoNBoNTrainer, count: int | None = None) -> dict[str, Any]:
    """The first groups, laid out as a batch."""
    groups = trainer.selection
    shapes = groups.shapes[:count]
    parts = [own for (own,) in deal(shapes, trainer.max_batch_tokens)]
    return trainer.data_collator(
        [([groups[i] for i in part], len(part) / len(shapes)) for part in parts]
    )


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy_logps(tiny_model: Path, groups: Groups) -> list[list[float]]:
    """Every completion's log-probability under the untrained model, alone in its batch."""
    model, _ = load_policy(str(tiny_model), device="cpu")
    return [[one_by_one(model, g.prompt_token_ids, ids) for ids in g.token_ids] for g in groups]


def chosen_logps(objective: str, groups: Groups, policy: list[list[float]]) -> GroupLogps:
    """What the objective is to be given."""
    columns: list[list[list[float]]] = [[], [], []]
    for group, logps in zip(groups, policy, strict=True):
        indices = OBJECTIVES[objective].select(group)
        assert indices is not None
        for column, values in zip(
            columns, (logps, group.logprobs, group.rewards or ()), strict=True
        ):
            column.append([values[index] for index in indices])
    return GroupLogps(*(torch.tensor(column, dtype=torch.float64) for column in columns))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_the_loss_is_the_objective_of_the_log_probabilities(
    tiny_model: Path,
    groups: Groups,
    policy_logps: list[list[float]],
    tmp_path: Path,
    objective: str,
) -> None:
    """Whatever the layout and the parts of the batch."""
    settings: dict[str, Any] = {"alpha": 0.1, "beta": 0.2, "delta": 1.5}
    tilt: Any = BestOfN(N)
    if OBJECTIVES[objective].any_tilt:
        tilt, settings = WorstOfN(2.5), settings | {"tilt": "worst_of_n", "n": 2.5}
    logps = chosen_logps(objective, groups, policy_logps)
    asked = ObjectiveSettings(n=N, tilt=tilt, alpha=0.1, beta=0.2, delta=1.5)
    expected = float(OBJECTIVES[objective].loss(logps, asked).mean())
    trainer = trainer_of(tiny_model, tmp_path, groups, objective=objective, **settings)
    assert trainer.drawn == N
    for share_prompt in (False, True, None):
        trainer.args.share_prompt = share_prompt
        for tokens in (80, 10_000):
            trainer.max_batch_tokens = tokens
            batch = batch_of(trainer)
            assert (len(batch["parts"]) > 1) == (tokens == 80)
            loss = trainer.compute_loss(trainer.model, batch).detach()
            assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_metrics_are_logged(
    tiny_model: Path, groups: Groups, policy_logps: list[list[float]], tmp_path: Path
) -> None:
    """Averages over the groups, of the policy before its first step."""
    for objective in ("rank_regression", "bonbon", "sft_bon"):
        trainer = trainer_of(
            tiny_model,
            tmp_path,
            groups,
            objective=objective,
            per_device_train_batch_size=16,
            eval_dataset=groups,
            learning_rate=1e-9,
            max_batch_tokens=100,
        )
        trainer.train()
        expected = group_metrics(chosen_logps(objective, groups, policy_logps))
        assert ("margin" in expected) == ("accuracy" in expected) == (objective != "sft_bon")
        for prefix, logged in (("", trainer.state.log_history[0]), ("eval_", trainer.evaluate())):
            found = trainer.state.log_history[-1] if prefix else logged
            for name, values in expected.items():
                assert found[prefix + name] == pytest.approx(float(values.mean()), rel=1e-4)
            assert (prefix + "margin" in found) == (objective != "sft_bon")


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


@pytest.mark.parametrize("objective", ["bonbon", "rank_regression"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_in_parts_trains_as_one_pass(
    tiny_model: Path, groups: Groups, tmp_path: Path, objective: str, accumulated: int
) -> None:
    """The same weights after several steps, though parts are of unequal numbers of groups."""
    settings: dict[str, Any] = {
        "objective": objective,
        "optim": "sgd",
        "learning_rate": 1e-6,
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 2,
    }
    whole = trainer_of(tiny_model, tmp_path / "a", groups, max_batch_tokens=10**6, **settings)
    tokens = {"bonbon": 90, "rank_regression": 180}[objective]
    split = trainer_of(tiny_model, tmp_path / "b", groups, max_batch_tokens=tokens, **settings)
    (parts, one) = (
        [len(part["ref_logps"]) for part in batch["parts"]]
        for batch in (batch_of(trainer, 5) for trainer in (split, whole))
    )
    assert len(set(parts)) > 1
    assert one == [5]
    before = weights(whole)
    whole.train()
    split.train()
    assert whole.state.global_step == split.state.global_step > 2
    after = weights(whole)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-5
    assert_same(after, weights(split), atol=2e-3 * moved)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, split)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_held_out_loss_is_the_mean_over_groups_whatever_the_batches(
    tiny_model: Path, groups: Groups, policy_logps: list[list[float]], tmp_path: Path
) -> None:
    found = []
    for batch_size, tokens in ((16, 10**6), (5, 10**6), (5, 90), (16, 90)):
        trainer = trainer_of(
            tiny_model,
            tmp_path,
            groups,
            objective="rank_regression",
            eval_dataset=groups,
            per_device_eval_batch_size=batch_size,
            max_batch_tokens=tokens,
        )
        found.append(trainer.evaluate()["eval_loss"])
    logps = chosen_logps("rank_regression", groups, policy_logps)
    settings = ObjectiveSettings(n=N, tilt=ExponentialTilt.with_win_rate(N / (N + 1)))
    expected = float(OBJECTIVES["rank_regression"].loss(logps, settings).mean())
    assert found == pytest.approx([expected] * len(found), rel=1e-4)


@pytest.mark.parametrize("objective", ["bonbon", "rank_regression"])
def test_a_shared_prompt_trains_as_prompts_of_their_own(
    stories260k: Path, tmp_path: Path, objective: str
) -> None:
    """Loss and gradient of a pretrained model, to 1e-5 of their size."""
    model, tokenizer = load_policy(str(stories260k), device="cpu")
    texts = {
        "Once upon a time, there was a little girl named Lily. She": (
            " loved to play outside in the park.",
            " was sad.",
            " had a big red ball and a cat.",
            " and",
        ),
        "Tom and Sam": (" ran home. They were very tired.", " saw a dog.", ".", " like to jump"),
        "The": (" sun was hot and the sky blue.", " big bear", " end", " boy said hello to Mom"),
    }
    groups = []
    for index, (prompt, completions) in enumerate(texts.items()):
        ids = tokenizer(prompt).input_ids
        drawn = [tokenizer(text, add_special_tokens=False).input_ids for text in completions]
        base = [one_by_one(model, ids, completion) - 0.5 * k for k, completion in enumerate(drawn)]
        groups.append(
            group_of(
                f"p{index}",
                prompt,
                completions,
                prompt_token_ids=tuple(ids),
                token_ids=tuple(map(tuple, drawn)),
                logprobs=tuple(base),
                rewards=tuple(np.roll([0.3, 0.9, 0.1, 0.5], index).tolist()),
            )
        )
    results = []
    for share_prompt in (False, True):
        trainer = trainer_of(
            stories260k, tmp_path, groups, objective=objective, share_prompt=share_prompt
        )
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        batch = batch_of(trainer)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        results.append((float(loss.detach()), gradients))
    (plain, gradients), (shared, other) = results
    assert shared == pytest.approx(plain, rel=1e-5)
    steepest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert steepest > 0
    assert_same(other, gradients, atol=1e-5 * steepest)


def test_sharing_is_chosen_where_it_saves_a_quarter_of_the_tokens() -> None:
    def rows(prompt: int, m: int, width: int) -> Any:
        return group_rows([[5] * prompt], [[[6] * width] * m], 0)

    assert not sharing_pays(rows(40, 1, 1))  # nothing to share it with
    for m in (2, 4, 8):
        for prompt in (1, 5, 10, 20, 40):
            for width in (1, 10, 30):
                saved = (m - 1) * prompt / (m * (prompt + width))
                assert sharing_pays(rows(prompt, m, width)) == (saved >= 0.25)


def test_how_often_the_prompt_is_computed(tiny_model: Path, tmp_path: Path) -> None:
    """Once for all completions, in a pass of its own, where that is asked for or pays."""
    generator = np.random.default_rng(0)

    def of(prompt: int, width: int) -> Group:
        return group_of(
            f"g{prompt}",
            completions=["x"] * N,
            prompt_token_ids=tuple(generator.integers(3, 259, prompt).tolist()),
            token_ids=tuple(tuple(generator.integers(3, 259, width).tolist()) for _ in range(N)),
            logprobs=(-9.0,) * N,
            rewards=(0.0, 1.0, 2.0, 3.0),
        )

    passes: list[tuple[int, ...]] = []
    for group, shapes in (
        (of(20, 4), {True: [(1, 19), (4, 4)], False: [(4, 23)], None: [(1, 19), (4, 4)]}),
        (of(3, 20), {True: [(1, 2), (4, 20)], False: [(4, 22)], None: [(4, 22)]}),
    ):
        trainer = trainer_of(tiny_model, tmp_path, [group], objective="rank_regression")
        batch = batch_of(trainer)
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        for share_prompt, expected in shapes.items():
            trainer.args.share_prompt = share_prompt
            passes.clear()
            trainer.compute_loss(trainer.model, batch)
            assert passes == expected


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
    with pytest.raises(BonbonError, match=r"truncated distribution, which objective \w+ would"):
        trainer_of(tiny_model, tmp_path, cut)
    for objective, it in OBJECTIVES.items():
        if it.compares:
            with pytest.raises(BonbonError, match=f"which objective {objective} would compare"):
                trainer_of(tiny_model, tmp_path, cut, objective=objective)
        else:
            trainer_of(tiny_model, tmp_path, cut, objective=objective)


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
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_local_attention_shares_the_prompt_too(groups: Groups, tmp_path: Path) -> None:
    """GPT-Neo's layers with a window of 4 say so nowhere but in their own forward pass."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=259,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    args = BoNBoNConfig(str(tmp_path), use_cpu=True, report_to="none", objective="rank_regression")
    trainer = BoNBoNTrainer(GPTNeoForCausalLM(config), args, groups)
    batch = batch_of(trainer)
    losses = []
    for share_prompt in (False, True):
        args.share_prompt = share_prompt
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_model_that_cannot_share_the_prompt_says_so(groups: Groups, tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=2))
    args = BoNBoNConfig(str(tmp_path), use_cpu=True, report_to="none", share_prompt=True)
    with pytest.raises(BonbonError, match="set share_prompt to false"):
        BoNBoNTrainer(model, args, groups)
    args.share_prompt = None
    trainer = BoNBoNTrainer(model, args, groups)
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_functional_dropout_is_off_too(groups: Groups, tmp_path: Path) -> None:
    """OPT applies dropout as a function, of a rate that its modules hold as a number."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=259, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.5, pad_token_id=0,
    )  # fmt: skip
    args = BoNBoNConfig(str(tmp_path), use_cpu=True, report_to="none")
    model = BoNBoNTrainer(OPTForCausalLM(config), args, groups).model.train()
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(model(ids).logits, model(ids).logits)


def test_tied_groups_are_dropped_and_counted(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    tied = random_group(99, np.random.default_rng(1), [0.5] * N)
    trainer = trainer_of(tiny_model, tmp_path, [*groups, tied])
    assert trainer.selection.tied == 1
    assert len(trainer.train_dataset) == len(groups)


def test_nothing_is_left_of_the_selected_groups(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    """Neither of a training nor of a selection that fails, early or late."""
    trainer = trainer_of(tiny_model, tmp_path, groups, eval_dataset=groups)
    assert list(tmp_path.rglob("*selected*")) == []
    assert len(list(trainer.train_dataset)) == len(groups)
    tied = random_group(99, np.random.default_rng(1), [0.5] * N)
    for bad in ([*groups, groups[0].part(0, 2)], [tied]):
        with pytest.raises(BonbonError, match=r"groups of one size|rewards? tie"):
            trainer_of(tiny_model, tmp_path, bad)
        assert list(tmp_path.rglob("*selected*")) == []


def test_other_groups_than_those_of_the_start_can_be_evaluated(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    expected = trainer_of(tiny_model, tmp_path, groups, eval_dataset=groups[:7]).evaluate()
    trainer = trainer_of(tiny_model, tmp_path, groups)
    found = trainer.evaluate(groups[:7])
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    both = trainer.evaluate({"a": groups[:7], "b": list(groups[7:])})
    assert both["eval_a_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert both["eval_b_loss"] != both["eval_a_loss"]
    with pytest.raises(BonbonError, match="differ in n"):
        trainer.evaluate([group.part(0, 2) for group in groups])
    anew = trainer_of(tiny_model, tmp_path, groups, logprobs="recompute")
    with pytest.raises(BonbonError, match="no longer the base model"):
        anew.evaluate(groups[:7])
    with pytest.raises(BonbonError, match="one data set of groups"):
        trainer_of(tiny_model, tmp_path, groups, eval_dataset={"a": groups})
    with pytest.raises(BonbonError, match="no labels to predict"):
        trainer.predict(groups)


@pytest.mark.parametrize("workers", [1, 2])
def test_data_loader_workers_change_nothing(
    tiny_model: Path, groups: Groups, tmp_path: Path, workers: int
) -> None:
    alone = trainer_of(tiny_model, tmp_path, groups, eval_dataset=groups)
    helped = trainer_of(
        tiny_model, tmp_path, groups, eval_dataset=groups, dataloader_num_workers=workers
    )
    for trainer in (alone, helped):
        trainer.train()
    assert_same(weights(helped), weights(alone), atol=0)
    assert helped.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]


def test_processes_that_would_train_apart_are_refused(
    tiny_model: Path, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bonbon.training.trainer.process_count", lambda: 2)
    with pytest.raises(BonbonError, match="2 processes were started and each would train alone"):
        trainer_of(tiny_model, tmp_path, groups)


def test_without_an_accelerator_it_trains_on_the_cpu(tmp_path: Path) -> None:
    has_one = torch.accelerator.current_accelerator(check_available=True) is not None
    assert BoNBoNConfig(str(tmp_path)).use_cpu != has_one


def test_a_training_that_diverges_ends(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, learning_rate=1e30, num_train_epochs=5)
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step \d+; lower the learning"):
        trainer.train()


def test_a_datasets_dataset_of_group_rows(tiny_model: Path, groups: Groups, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([group.to_row() for group in groups])
    trainer = trainer_of(tiny_model, tmp_path, rows)
    expected = trainer_of(tiny_model, tmp_path, groups)
    assert list(trainer.train_dataset) == list(expected.train_dataset)


# --- what is aimed at -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name, it in OBJECTIVES.items() if not it.any_tilt])
@pytest.mark.parametrize(
    "setting", [{"n": 8}, {"n": 2.5}, {"tilt": "worst_of_n"}, {"tilt": "optimal"}]
)
def test_objectives_of_the_best_of_the_drawn_refuse_another_aim(
    tiny_model: Path, groups: Groups, tmp_path: Path, objective: str, setting: dict[str, Any]
) -> None:
    """In a sentence that names the objectives that can do it."""
    with pytest.raises(BonbonError) as caught:
        trainer_of(tiny_model, tmp_path, groups, objective=objective, **setting)
    said = str(caught.value)
    assert f"objective {objective} aims at the best of the n drawn ({N})" in said
    assert f"not at n = {setting.get('n', N):g} of {setting.get('tilt', 'best_of_n')}" in said
    free = said.partition("objectives for any n and tilt are ")[2].split(", ")
    assert free == [name for name, it in OBJECTIVES.items() if it.any_tilt]
    assert "\n" not in said


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_may_be_told_the_n_that_was_drawn(
    tiny_model: Path, groups: Groups, tmp_path: Path, objective: str
) -> None:
    for n in (None, N):
        trainer = trainer_of(tiny_model, tmp_path, groups, objective=objective, n=n)
        assert (trainer.n, trainer.drawn, trainer._settings.n) == (N, N, N)


def test_the_trainer_s_defaults_are_the_configuration_s(tmp_path: Path) -> None:
    """What a run and a script leave out is the same."""
    by_script, by_run = BoNBoNConfig(str(tmp_path), report_to="none"), TrainConfig()
    for name in (
        "objective", "tilt", "n", "alpha", "beta", "learning_rate", "kl_budget", "logprobs",
    ):  # fmt: skip
        assert getattr(by_script, name) == getattr(by_run, name), name
    for name, value in by_run.arguments:
        assert getattr(by_script, name) == ([] if name == "report_to" else value), name


def test_the_default_aim_is_best_of_n_s_win_rate_at_the_least_kl(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    args = BoNBoNConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = BoNBoNTrainer(str(tiny_model), args, groups)  # a model by its name
    assert trainer.processing_class.pad_token_id == 0
    assert trainer.objective is OBJECTIVES["rank_regression"]
    assert trainer._settings.tilt == ExponentialTilt.with_win_rate(N / (N + 1))
    assert trainer._settings.tilt.kl() == pytest.approx(float(optimal_kl(N / (N + 1))))


@pytest.mark.parametrize("objective", [name for name, it in OBJECTIVES.items() if it.any_tilt])
@pytest.mark.parametrize(
    ("setting", "tilt"),
    [
        ({"n": 64, "tilt": "best_of_n"}, BestOfN(64)),
        ({"n": 1.5, "tilt": "best_of_n"}, BestOfN(1.5)),
        ({"tilt": "worst_of_n"}, WorstOfN(N)),
        ({"tilt": "optimal", "n": 8}, ExponentialTilt.with_win_rate(8 / 9)),
        ({"n": 2.5}, None),
    ],
    ids=str,
)
def test_objectives_of_all_ranks_aim_at_any_tilt(
    tiny_model: Path,
    groups: Groups,
    tmp_path: Path,
    objective: str,
    setting: dict[str, Any],
    tilt: Any,
) -> None:
    trainer = trainer_of(tiny_model, tmp_path, groups, objective=objective, **setting)
    by_default = {"optimal": ExponentialTilt.with_win_rate(2.5 / 3.5), "best_of_n": BestOfN(2.5)}
    assert trainer._settings.tilt == (tilt or by_default[OBJECTIVES[objective].tilt])
    assert (OBJECTIVES[objective].tilt == "best_of_n") == (objective == "weighted_sft")
    assert trainer._settings.n == trainer.drawn == N
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_training_aims_at_more_than_was_drawn(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    """Best-of-64 of 4 draws: the preferred completions gain more than for best-of-4."""
    gains = []
    for n in (N, 64):
        trainer = trainer_of(
            tiny_model, tmp_path, groups, objective="rank_regression", n=n, num_train_epochs=15,
            learning_rate=3e-3,
        )  # fmt: skip
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "margin" in entry]
        assert history[-1]["loss"] < history[0]["loss"]
        gains.append(history[-1]["margin"] - history[0]["margin"])
    assert gains[1] > gains[0] + 5


def test_training_and_held_out_groups_are_of_one_size(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    generator = np.random.default_rng(5)
    other = [random_group(i, generator, [0.1, 0.7, 0.3]) for i in range(3)]
    with pytest.raises(BonbonError, match=r"differ in n: \[3, 4\]"):
        trainer_of(tiny_model, tmp_path, groups, eval_dataset=other)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 180, 300, 10_000])
def test_a_batch_s_parts_hold_every_group_once(
    tiny_model: Path, groups: Groups, tmp_path: Path, tokens: int
) -> None:
    trainer = trainer_of(
        tiny_model, tmp_path, groups, objective="rank_regression", max_batch_tokens=tokens
    )
    selected = trainer.selection
    order = [index for (own,) in deal(selected.shapes, tokens) for index in own]
    parts = batch_of(trainer)["parts"]
    assert sorted(order) == list(range(len(selected)))
    assert sum(float(part["share"]) for part in parts) == pytest.approx(1)
    found = iter(order)
    for part in parts:
        size, m, _ = part["completion_ids"].shape
        assert float(part["share"]) == pytest.approx(size / len(selected))
        for g in range(size):
            group = selected[next(found)]
            prompt = part["prompt_ids"][g][part["prompt_mask"][g] > 0]
            assert tuple(prompt.tolist()) == group.prompt_token_ids
            for k in range(m):
                ids = part["completion_ids"][g, k][part["completion_mask"][g, k] > 0]
                assert tuple(ids.tolist()) == group.completions[k]
            assert part["ref_logps"][g].tolist() == pytest.approx(group.ref_logps)
            assert tuple(part["rewards"][g].tolist()) == group.rewards  # to the last digit
    assert 1 < len(parts) < len(selected) or tokens in (1, 10_000)
    assert (len(parts) == 1) == (tokens == 10_000)


def test_rewards_that_differ_in_the_last_digit_are_ranked(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    close = [1.0, math.nextafter(1.0, 2), math.nextafter(1.0, 0), 0.0]
    group = random_group(0, np.random.default_rng(0), close)
    trainer = trainer_of(tiny_model, tmp_path, [group], objective="rank_regression")
    (part,) = batch_of(trainer)["parts"]
    assert part["rewards"].argsort().tolist() == [[3, 2, 0, 1]]
    assert part["rewards"].unique().numel() == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "ppo"}, "unknown objective 'ppo'"),
        ({"alpha": 1.5}, "alpha = 1.5: Input should be less than or equal to 1"),
        ({"beta": 0.0}, "beta = 0.0: Input should be greater than 0"),
        ({"delta": 0.0}, "delta = 0.0: Input should be greater than 0"),
        ({"delta": math.nan}, "delta = nan: Input should be a finite number"),
        (
            {"tilt": "cubic"},
            "tilt = 'cubic': unknown tilt; choose one of best_of_n, optimal, worst_of_n",
        ),
        ({"n": 1}, "n = 1: Input should be greater than 1"),
        ({"n": math.inf}, "n = inf: Input should be (less than or equal to 10000|a finite number)"),
        ({"n": math.nan}, "n = nan: Input should be a finite number"),
        (
            {"max_batch_tokens": 0},
            "max_batch_tokens = 0: Input should be greater than or equal to 1",
        ),
        ({"global_batch_size": 0}, "global_batch_size = 0: Input should be greater than or equal"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BonbonError, match=message):
        BoNBoNConfig(str(tmp_path), **setting)


def test_an_adapter_begins_the_same_whatever_was_drawn_before(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    begun = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        begun.append(weights(trainer_of(tiny_model, tmp_path, groups, peft_config=lora)))
    assert_same(*begun, atol=0)


def test_uneven_batches_weigh_every_group_the_same(
    tiny_model: Path, groups: Groups, tmp_path: Path
) -> None:
    """Two batches, of 11 groups and of 5, train as one of all 16."""
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-6, "max_grad_norm": 1e9}
    split = {"global_batch_size": 11, "gradient_accumulation_steps": 2}
    large = trainer_of(tiny_model, tmp_path / "a", groups, global_batch_size=16, **plain)
    small = trainer_of(tiny_model, tmp_path / "b", groups, **plain, **split)
    before = weights(large)
    large.train()
    small.train()
    assert large.state.global_step == small.state.global_step == 1
    after = weights(large)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-5
    assert_same(after, weights(small), atol=2e-3 * moved)
