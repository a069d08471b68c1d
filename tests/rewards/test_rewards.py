"""Rewards: functions, sums and models, and what score_groups lets through."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from bonbon.groups.group import Prompt, as_text
from bonbon.rewards.model import RewardModel
from bonbon.rewards.reward import FunctionReward, WeightedSum, score_groups
from bonbon.rewards.shared_prefix import shared_beginnings
from bonbon.system.errors import BonbonError
from support.groups import MakeGroup
from support.models import CONTEXT, EOS, build_tiny_reward_model, byte_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
USER_CODE = """
def length(prompts, completions):
    return [len(text) for text in completions]

def prompt_length(prompts, completions):
    return [float(len(prompt)) for prompt in prompts]

def failing(prompts, completions):
    raise RuntimeError("first line\\nsecond line")

def silent(prompts, completions):
    raise KeyError

def words(prompts, completions):
    return completions

constant = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder."""
    (tmp_path / "user_rewards.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "user_rewards", raising=False)
    return "user_rewards"


# --- functions ------------------------------------------------------------------------------------


def test_a_function_of_the_current_folder_is_found(user_module: str) -> None:
    reward = FunctionReward.from_name(f"{user_module}:length")
    scores = reward(["p", "p"], ["abc", ""])
    assert scores.dtype == np.float64
    assert scores.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("length", "write it as package.module:function"),
        (":length", "write it as package.module:function"),
        ("user_rewards:", "write it as package.module:function"),
        ("no_such_module:length", "cannot be imported: ModuleNotFoundError"),
        ("user_rewards:lenght", "cannot be imported: AttributeError"),
        ("user_rewards:constant", "is not a function"),
    ],
)
def test_a_function_that_is_not_found_is_named(user_module: str, name: str, said: str) -> None:
    with pytest.raises(BonbonError) as caught:
        FunctionReward.from_name(name)
    assert f"reward function {name!r}" in str(caught.value)
    assert said in str(caught.value)


def test_a_module_that_raises_is_named(user_module: str, tmp_path: Path) -> None:
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    with pytest.raises(BonbonError, match=r"'broken_rewards:f' .*ZeroDivisionError: division"):
        FunctionReward.from_name("broken_rewards:f")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("failing", "RuntimeError: first line second line"),  # in one line
        ("silent", "failed: KeyError"),
        ("words", "failed: ValueError: could not convert string to float"),
    ],
)
def test_a_function_that_fails_is_named(user_module: str, function: str, said: str) -> None:
    reward = FunctionReward.from_name(f"{user_module}:{function}")
    with pytest.raises(BonbonError) as caught:
        reward(["p"], ["text"])
    assert f"'{user_module}:{function}'" in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is let through --------------------------------------------------------------------------


def returning(values: object) -> FunctionReward:
    return FunctionReward("user:f", lambda prompts, completions: values)


def test_groups_are_scored_in_one_call_with_their_own_prompts(make_group: MakeGroup) -> None:
    calls: list[tuple[Sequence[Prompt], Sequence[str]]] = []

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[int]:
        calls.append((prompts, completions))
        return list(range(len(completions)))

    groups = [make_group("a", "A", ["x", "y"]), make_group("b", "B", ["z"])]
    assert score_groups(FunctionReward("user:f", reward), groups) == [(0.0, 1.0), (2.0,)]
    assert calls == [(["A", "A", "B"], ["x", "y", "z"])]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(make_group: MakeGroup, bad: float) -> None:
    groups = [make_group("fine", completions=["x", "y"]), make_group("odd", completions=["z", "w"])]
    with pytest.raises(BonbonError) as caught:
        score_groups(returning([0.0, 1.0, 2.0, bad]), groups)
    assert f"prompt odd, completion 2 of 2 ('w') is {bad}" in str(caught.value)


@pytest.mark.parametrize("values", [[1.0], 1.0, [[1.0], [2.0], [3.0]], [], [1.0] * 4])
def test_a_wrong_shape_is_named(make_group: MakeGroup, values: object) -> None:
    groups = [make_group("first", completions=["x"]), make_group("last", completions=["y", "z"])]
    with pytest.raises(BonbonError) as caught:
        score_groups(returning(values), groups)
    shape = np.shape(np.asarray(values))
    assert f"shape {shape} for 3 completions (prompts first to last)" in str(caught.value)


# --- sums -----------------------------------------------------------------------------------------


def test_a_sum_weighs_its_parts(user_module: str) -> None:
    parts = [FunctionReward.from_name(f"{user_module}:{f}") for f in ("length", "prompt_length")]
    reward = WeightedSum(((0.5, parts[0]), (-2.0, parts[1])))
    assert reward(["pp", "p"], ["abcd", ""]).tolist() == [2.0 - 4.0, 0.0 - 2.0]


def test_a_single_number_is_not_spread_over_a_sum() -> None:
    reward = WeightedSum(((1.0, returning([1.0, 2.0])), (1.0, returning(3.0))))
    with pytest.raises(BonbonError, match=r"part 2 .* shape \(\) for 2 completions"):
        reward(["p", "p"], ["x", "y"])


# --- models ---------------------------------------------------------------------------------------

PROMPTS = ["Tell me", "Hi", "Once upon a time there was", "Hi", "Ä"]
COMPLETIONS = [" a joke, please", "", " a cat. " * 4, " there", " 🐈"]


@pytest.fixture(scope="module")
def reward_model(tiny_reward_model: Path) -> RewardModel:
    return RewardModel.from_pretrained(str(tiny_reward_model), device="cpu")


def one_by_one(reward: RewardModel) -> list[float]:
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [float(reward([prompt], [text])[0]) for prompt, text in pairs]


@pytest.mark.parametrize("max_batch_tokens", [1, 60, 130, 10_000])
def test_batches_do_not_change_scores(reward_model: RewardModel, max_batch_tokens: int) -> None:
    alone = one_by_one(reward_model)
    assert np.ptp(alone) > 0.1  # scores that differ, or nothing would be compared
    batched = RewardModel(reward_model.model, reward_model.tokenizer, max_batch_tokens)
    np.testing.assert_allclose(batched(PROMPTS, COMPLETIONS), alone, atol=1e-5)
    backwards = batched(PROMPTS[::-1], COMPLETIONS[::-1])[::-1]
    np.testing.assert_allclose(backwards, alone, atol=1e-5)


def test_scores_are_the_model_s_own(reward_model: RewardModel) -> None:
    ids = reward_model.tokenizer(PROMPTS[0], COMPLETIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = reward_model.model(input_ids=ids).logits.item()
    assert reward_model(PROMPTS[:1], COMPLETIONS[:1])[0] == pytest.approx(expected, abs=1e-6)


def test_no_completions_have_no_scores(reward_model: RewardModel) -> None:
    assert reward_model([], []).shape == (0,)


def test_a_padding_token_that_model_and_tokenizer_disagree_on(tiny_reward_model: Path) -> None:
    reward = RewardModel.from_pretrained(str(tiny_reward_model), device="cpu")
    alone = one_by_one(reward)
    reward.model.config.pad_token_id = 77  # the model would take the padding for the text's end
    again = RewardModel(reward.model, reward.tokenizer)
    np.testing.assert_allclose(again(PROMPTS, COMPLETIONS), alone, atol=1e-5)


def test_without_a_padding_token_the_end_token_pads(tiny_reward_model: Path) -> None:
    reward = RewardModel.from_pretrained(str(tiny_reward_model), device="cpu")
    alone = one_by_one(reward)
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    tokenizer.pad_token = None
    reward.model.config.pad_token_id = None
    again = RewardModel(reward.model, tokenizer)
    np.testing.assert_allclose(again(PROMPTS, COMPLETIONS), alone, atol=1e-5)


def test_token_types_are_given_to_a_model_that_has_them() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = pair_types()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=259,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=CONTEXT,
                num_labels=1,
                initializer_range=0.5,
            )
        ).eval()
    reward = RewardModel(model, tokenizer)
    inputs = tokenizer(PROMPTS[0], COMPLETIONS[0], return_tensors="pt")
    assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
    with torch.no_grad():
        expected = model(**inputs).logits.item()
        without = model(input_ids=inputs["input_ids"]).logits.item()
    assert abs(expected - without) > 1e-3
    assert reward(PROMPTS, COMPLETIONS)[0] == pytest.approx(expected, abs=1e-5)


def pair_types() -> object:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1)]
    )


# --- shared beginnings ----------------------------------------------------------------------------

STORY = "Once upon a time there was"
SHARED_PROMPTS = [STORY] * 4 + ["Hi"] * 3 + ["A dog and a cat"] + [STORY] * 2
SHARED_COMPLETIONS = [
    *(" a cat.", "", " a cat and a dog", " a"),
    *(" there", "", " 🐈"),
    " sat",
    *("", ""),
]


def classifier(kind: Any, **changes: Any) -> Any:
    """A random float64 classifier of two layers over the byte tokenizer's tokens."""
    values = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
        "num_labels": 1,
        "pad_token_id": 0,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(**(values | changes))
        return AutoModelForSequenceClassification.from_config(config).double().eval()


def columns_read(model: Any) -> list[tuple[int, int]]:
    """The shape of the tokens of each forward pass from now on."""
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def plain_scores(reward: RewardModel, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Any]:
    """Each row alone through the model, without any padding or cache."""
    rows = [reward.encode(*pair) for pair in zip(prompts, texts, strict=True)]
    with torch.no_grad():
        return [reward.model(input_ids=torch.tensor([row])).logits.item() for row in rows]


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, GPT2Config], ids=lambda k: k.model_type)
def test_a_shared_beginning_is_read_once(kind: Any, max_batch_tokens: int) -> None:
    reward = RewardModel(classifier(kind), byte_tokenizer(), max_batch_tokens)
    expected = plain_scores(reward, SHARED_PROMPTS, SHARED_COMPLETIONS)
    read = columns_read(reward.model)
    found = reward(SHARED_PROMPTS, SHARED_COMPLETIONS)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.ptp(found) > 0.1
    rows = [reward.encode(*pair) for pair in zip(SHARED_PROMPTS, SHARED_COMPLETIONS, strict=True)]
    if max_batch_tokens == 1:  # or there would be padding
        assert sum(count * width for count, width in read) < 0.7 * sum(map(len, rows))


def test_a_model_that_only_looks_causal_is_found_out() -> None:
    """Its configuration has no `is_causal`, and yet a token sees those behind it."""
    reward = RewardModel(
        classifier(GemmaConfig, use_bidirectional_attention=True, head_dim=8), byte_tokenizer(), 1
    )
    expected = plain_scores(reward, SHARED_PROMPTS, SHARED_COMPLETIONS)
    found = reward(SHARED_PROMPTS, SHARED_COMPLETIONS)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("ended", [False, True])
def test_shared_beginnings_where_the_end_token_pads(ended: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    reward = RewardModel(classifier(LlamaConfig), tokenizer)
    # The model looks for a row's last token that does not pad, so texts may end in the prompt.
    texts = [text + "</s>" * ended for text in SHARED_COMPLETIONS]
    expected = plain_scores(reward, SHARED_PROMPTS, texts)
    np.testing.assert_allclose(reward(SHARED_PROMPTS, texts), expected, atol=1e-10)


def test_shared_beginnings_of_chats_and_of_rows_that_are_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    reward = RewardModel(classifier(LlamaConfig), tokenizer)
    prompts: list[Prompt] = [DIALOGUE] * 4 + ["x" * 50] * 3
    texts = ["", " there", " you", " again", " 1", " 2 and much more than fits", ""]
    read = columns_read(reward.model)
    found = reward(prompts, texts)
    assert (1, len(reward.encode(DIALOGUE, "")) - 1) in read
    np.testing.assert_allclose(found, plain_scores(reward, prompts, texts), atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MistralConfig, {"sliding_window": 8}),
        (BertConfig, {}),
        (LlamaConfig, {"is_causal": False}),
    ],
    ids=["window", "encoder", "bidirectional"],
)
def test_other_models_read_every_row_whole(kind: Any, changes: dict[str, Any]) -> None:
    reward = RewardModel(classifier(kind, **changes), byte_tokenizer())
    rows = [reward.encode(*pair) for pair in zip(SHARED_PROMPTS, SHARED_COMPLETIONS, strict=True)]
    expected = plain_scores(reward, SHARED_PROMPTS, SHARED_COMPLETIONS)
    read = columns_read(reward.model)
    np.testing.assert_allclose(reward(SHARED_PROMPTS, SHARED_COMPLETIONS), expected, atol=1e-10)
    assert sum(count for count, _ in read) == len(rows)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), max_size=6),
)
def test_a_beginning_is_common_and_leaves_each_row_a_token(
    tails: list[list[int]], head: list[int]
) -> None:
    rows = [[*head, *tail] for tail in tails]
    common = [
        length
        for length in range(min(map(len, rows)))
        if len({tuple(row[:length]) for row in rows}) == 1
        and all(any(row[length:]) for row in rows)
    ]
    pays = 4 * (len(rows) - 1) * max(common, default=0) >= sum(map(len, rows))
    beginnings = shared_beginnings(["x"] * len(rows), rows, pad_id=0)
    assert len(beginnings) == int(pays)
    for found in beginnings:
        assert found.rows == tuple(range(len(rows)))
        assert len({tuple(row[: found.length]) for row in rows}) == 1
        assert all(any(row[found.length :]) for row in rows)
        saved = (len(rows) - 1) * found.length
        assert 4 * saved >= sum(map(len, rows))


# --- encoding -------------------------------------------------------------------------------------


def decoded(reward: RewardModel, prompt: Prompt, completion: str) -> str:
    return str(reward.tokenizer.decode(reward.encode(prompt, completion)))


@pytest.fixture
def chat_reward(tiny_reward_model: Path, reward_model: RewardModel) -> RewardModel:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    tokenizer.chat_template = CHAT_TEMPLATE
    return RewardModel(reward_model.model, tokenizer)


DIALOGUE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("prompt", "pair", "chat"),
    [
        ("Hi", "<s>Hi there", "<u>Hi<a> there"),
        (DIALOGUE[:1], "<s>Hi there", "<u>Hi<a> there"),
        (
            DIALOGUE,
            "<s>user: Hi\nassistant: Yes?\nuser: Bye there",
            "<u>Hi<a>Yes?<u>Bye<a> there",
        ),
    ],
    ids=["text", "one message", "dialogue"],
)
def test_pairs_and_chats_are_encoded(
    reward_model: RewardModel, chat_reward: RewardModel, prompt: Prompt, pair: str, chat: str
) -> None:
    assert decoded(reward_model, prompt, " there") == pair
    assert decoded(chat_reward, prompt, " there") == chat
    assert chat_reward([prompt], [" there"])[0] != reward_model([prompt], [" there"])[0]


def test_a_dialogue_as_one_text() -> None:
    assert as_text("Hi") == as_text(DIALOGUE[:1]) == "Hi"
    assert as_text(DIALOGUE) == "user: Hi\nassistant: Yes?\nuser: Bye"


@pytest.mark.parametrize("chat", [False, True], ids=["pair", "chat"])
def test_too_long_a_text_loses_its_beginning(
    reward_model: RewardModel, chat_reward: RewardModel, chat: bool
) -> None:
    reward = chat_reward if chat else reward_model
    prompt, completion = "x" * 100, " and the end"
    whole = prompt + ("<a>" if chat else "") + completion
    # A pair begins with the begin token, which stays; this chat template writes none.
    expected = whole[-CONTEXT:] if chat else "<s>" + whole[1 - CONTEXT :]
    assert decoded(reward, prompt, completion) == expected
    assert len(reward.encode(prompt, completion)) == CONTEXT
    assert np.isfinite(reward([prompt, "y"], [completion] * 2)).all()


def test_a_tokenizer_s_own_limit_holds_too(
    tiny_reward_model: Path, reward_model: RewardModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model, model_max_length=10)
    reward = RewardModel(reward_model.model, tokenizer)
    assert decoded(reward, "x" * 100, "the end") == "<s>xxthe end"


# --- loading --------------------------------------------------------------------------------------


def test_a_model_of_two_outputs_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(BonbonError, match="the reward model has 2 outputs; a reward model has one"):
        RewardModel.from_pretrained(str(folder), device="cpu")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"reward model .*nowhere: there is no such folder"):
        RewardModel.from_pretrained(str(tmp_path / "nowhere"))
