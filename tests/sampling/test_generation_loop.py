"""Rows: stopping at any token, dropping and branching rows, stop strings."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.source import LocalSource
from bonbon.groups.prompts import EncodedPrompt
from bonbon.models.fast_linear import fast_linear
from bonbon.models.loading import load_policy
from bonbon.sampling.completion_text import completion_text, cut_at_stop
from bonbon.sampling.distribution import draw_tokens
from bonbon.sampling.generation_loop import Rows
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError
from support.models import EOS, byte_tokenizer, tiny_llama_config

PROMPT = EncodedPrompt("p0", "x", (1, 5, 4))
VOCABULARY = 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Of six tokens, one of which is the end, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = tiny_llama_config(vocab_size=VOCABULARY)
        return LlamaForCausalLM(config).double().eval()


def source_of(model: LlamaForCausalLM, stop: tuple[str, ...] = (), **changes: Any) -> LocalSource:
    return LocalSource(model, byte_tokenizer(), SamplingConfig(**changes), stop)


def exact_logprob(model: LlamaForCausalLM, ids: tuple[int, ...]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT.token_ids, *ids]])).logits[0]
    log_probs = logits[len(PROMPT.token_ids) - 1 : -1].log_softmax(-1)
    return float(log_probs.gather(-1, torch.tensor(ids)[:, None]).sum())


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_drawing_piece_by_piece_is_drawing_at_once(model: Any, pieces: list[int]) -> None:
    source = source_of(model, n=6, max_new_tokens=10)
    (whole,) = source.draw([PROMPT], [range(6)])
    rows = source.start(PROMPT, 6)
    drawn = sum(rows.draw(piece) for piece in pieces)
    assert drawn == sum(rows.lengths()) == rows.generated
    assert max(rows.lengths()) <= min(sum(pieces), 10)
    rows.draw(10)
    assert rows.group() == whole.group
    assert all(rows.finished)
    assert rows.cache_tokens() == 0


def test_what_is_not_selected_frees_its_cache(model: LlamaForCausalLM) -> None:
    rows = source_of(model, n=16, max_new_tokens=20).start(PROMPT, 16)
    rows.draw(2)
    unfinished = [row for row, done in enumerate(rows.finished) if not done]
    rows.select(unfinished[:3])
    keys = rows._cache.layers[0].keys
    assert keys.shape[0] == 3
    assert keys.untyped_storage().nbytes() == keys.nbytes
    assert rows._cache.layers[0]._key_buffer is None  # or the old rows would still be held
    columns = len(PROMPT.token_ids) + 1  # the last drawn token is not read yet
    assert rows.cache_tokens() == 3 * columns == keys.shape[0] * keys.shape[2]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_selected_rows_go_on_as_if_nothing_had_happened(model: Any, data: st.DataObject) -> None:
    source = source_of(model, n=5, max_new_tokens=8, seed=7)
    (whole,) = source.draw([PROMPT], [range(5)])
    rows = source.start(PROMPT, 5)
    kept = list(range(5))
    for _ in range(2):
        rows.draw(data.draw(st.integers(0, 3)))
        chosen = data.draw(st.permutations(range(len(kept))))[: data.draw(st.integers(1, 3))]
        chosen = [row for row in chosen if row < len(kept)]
        rows.select(chosen)
        kept = [kept[row] for row in chosen]
    rows.draw(8)
    found = rows.group()
    assert found.token_ids == tuple(whole.group.token_ids[row] for row in kept)
    expected = [exact_logprob(model, ids) for ids in found.token_ids]
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-10)


def test_a_branch_is_a_fresh_draw_behind_what_it_shares(model: LlamaForCausalLM) -> None:
    """Branches of one row after a token are independent draws of the model given that token."""
    for seed in range(20):  # until the first token is not the end
        rows = source_of(model, n=1, max_new_tokens=2, seed=seed).start(PROMPT, 1)
        rows.draw(1)
        (first,) = rows.group().token_ids[0]
        if first != EOS:
            break
    rows.select([0] * 4000)
    assert rows.prefilled == len(PROMPT.token_ids)
    rows.draw(1)
    found = rows.group()
    assert {ids[0] for ids in found.token_ids} == {first}
    counts = Counter(ids[1] for ids in found.token_ids)
    weights = np.exp([exact_logprob(model, (first, token)) for token in range(VOCABULARY)])
    observed = [counts[token] for token in range(VOCABULARY)]
    assert chisquare(observed, 4000 * weights / weights.sum()).pvalue > 1e-3
    np.testing.assert_allclose(
        found.logprobs[:50], [exact_logprob(model, ids) for ids in found.token_ids[:50]], atol=1e-10
    )


def test_a_finished_row_can_be_selected_and_branched(model: LlamaForCausalLM) -> None:
    rows = source_of(model, n=12, max_new_tokens=6).start(PROMPT, 12)
    rows.draw(3)
    done = rows.finished.index(True)
    going = rows.finished.index(False)
    before = rows.group()
    rows.select([done, going, done])
    assert rows.finished == [True, False, True]
    rows.draw(6)
    after = rows.group()
    assert after.token_ids[0] == after.token_ids[2] == before.token_ids[done]
    assert after.token_ids[1][:3] == before.token_ids[going]
    assert after.finish_reasons[0] == "stop"


def test_several_prompts_with_rows_of_their_own_number(model: LlamaForCausalLM) -> None:
    prompts = [PROMPT, EncodedPrompt("p1", "x", (1, 4)), EncodedPrompt("p2", "x", (1, 3, 3, 5))]
    sampler = TransformersSampler(model, byte_tokenizer(), SamplingConfig(max_new_tokens=6))
    together = sampler.draw(prompts, [range(2), range(5), range(1, 2)])
    alone = [
        sampler.draw([prompt], [ks])[0]
        for prompt, ks in zip(prompts, [range(2), range(5), range(1, 2)], strict=True)
    ]
    assert len(together) == len(prompts)
    for found, single in zip(together, alone, strict=True):
        assert found.group.token_ids == single.group.token_ids
        assert found.cost.generated == sum(found.group.lengths())
        assert found.cost.prefilled == single.cost.prefilled == len(found.group.prompt_token_ids)


def test_prompts_that_are_read_again_are_counted_again(model: LlamaForCausalLM) -> None:
    config = SamplingConfig(max_new_tokens=6, max_batch_tokens=20)  # two rows at a time
    (found,) = TransformersSampler(model, byte_tokenizer(), config).draw([PROMPT], [range(5)])
    assert found.cost.prefilled == 3 * len(PROMPT.token_ids)


def test_probabilities_that_are_not_finite_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(BonbonError, match="not finite"):
        source_of(model, n=2, max_new_tokens=3, temperature=1e-320).draw([PROMPT], [range(2)])


def test_a_recurrent_model_cannot_select() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=1, eos_token_id=EOS
    )
    sampler = TransformersSampler(
        MambaForCausalLM(config).eval(), byte_tokenizer(), SamplingConfig(max_new_tokens=4)
    )
    (found,) = sampler.draw([PROMPT], [range(4)])
    assert found.cost.prefilled == 4 * len(PROMPT.token_ids)  # once a row
    rows = Rows(sampler.decoder(), [PROMPT], [range(2)])
    rows.draw(1)
    with pytest.raises(BonbonError, match="best_of_n"):
        rows.select([0])


# --- shared prompts -------------------------------------------------------------------------------


def long_prompts(*lengths: int) -> list[EncodedPrompt]:
    generator = np.random.default_rng(1)
    ids = [(1, *generator.integers(3, VOCABULARY, length - 1).tolist()) for length in lengths]
    return [EncodedPrompt(f"p{i}", "x", row) for i, row in enumerate(ids)]


def drawn(sampler: TransformersSampler, prompts: list[EncodedPrompt], ks: list[range]) -> Any:
    return [found.group for found in sampler.draw(prompts, ks)]


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows share their prompts even where it is not worth it."""
    monkeypatch.setattr("bonbon.models.shared_prompts._LEAST_SAVED", 1)


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bonbon.models.shared_prompts._LEAST_SAVED", 2**62)


def small(config: Any, **changes: Any) -> Any:
    """A random float64 model of two layers over six tokens."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config(**(values | changes))).double().eval()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig,
        Qwen2Config,
        Qwen3Config,
        MistralConfig,
        GemmaConfig,
        Phi3Config,
        Olmo2Config,
        GPT2Config,
        GPTNeoXConfig,
    ],
)
@pytest.mark.usefixtures("sharing")
def test_rows_that_share_their_prompt_draw_what_others_do(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sliding_window": None} if config is MistralConfig else {}
    model = small(config, **changes)
    # Uneven prompts and numbers, and rows that end before others.
    prompts, ks = long_prompts(20, 33, 17), [range(5), range(2, 5), range(4)]
    sampler = TransformersSampler(model, byte_tokenizer(), SamplingConfig(max_new_tokens=24))
    assert Rows(sampler.decoder(), prompts, ks)._shared is not None
    shared = drawn(sampler, prompts, ks)
    without_sharing(monkeypatch)
    for found, expected in zip(shared, drawn(sampler, prompts, ks), strict=True):
        assert found.token_ids == expected.token_ids
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-10)
    assert len({len(ids) for group in shared for ids in group.token_ids}) > 3
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DiffLlamaConfig, {}),  # gives the attention other values than it caches
        (
            DeepseekV3Config,  # caches what keys and values are made of
            {
                "kv_lora_rank": 32,
                "q_lora_rank": 16,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 2,
                "v_head_dim": 16,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16,
            },
        ),
        (NemotronConfig, {}),  # does not pass on what the attention needs
    ],
)
@pytest.mark.usefixtures("sharing")
def test_models_whose_attention_is_something_else_draw_as_before(
    config: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(config, **changes)
    prompts, ks = long_prompts(20, 33), [range(3), range(4)]
    sampler = TransformersSampler(model, byte_tokenizer(), SamplingConfig(max_new_tokens=6))
    found = drawn(sampler, prompts, ks)
    without_sharing(monkeypatch)
    assert len(found) == len(prompts)
    for group, expected in zip(found, drawn(sampler, prompts, ks), strict=True):
        assert group.token_ids == expected.token_ids


@pytest.mark.usefixtures("sharing")
def test_a_window_keeps_rows_from_sharing() -> None:
    model = small(MistralConfig, sliding_window=8)
    sampler = TransformersSampler(model, byte_tokenizer(), SamplingConfig(max_new_tokens=4))
    assert Rows(sampler.decoder(), long_prompts(20), [range(4)])._shared is None


@pytest.mark.usefixtures("sharing")
def test_shared_rows_can_be_selected_and_branched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(LlamaConfig)

    def played() -> Rows:
        source = source_of(model, n=6, max_new_tokens=12)
        (prompt,) = long_prompts(24)
        rows = source.start(prompt, 6)
        for chosen in ([3, 0, 5, 1], [2, 0, 0, 3, 0], [4, 1]):
            rows.draw(3)
            rows.select(chosen)
        rows.draw(12)
        return rows

    rows = played()
    assert rows._shared is None  # all are done
    shared = rows.group()
    without_sharing(monkeypatch)
    expected = played().group()
    assert shared.token_ids == expected.token_ids
    np.testing.assert_allclose(shared.logprobs, expected.logprobs, atol=1e-10)


@pytest.mark.usefixtures("sharing")
def test_a_prompt_is_held_once_and_freed_with_its_last_row() -> None:
    model = small(LlamaConfig)
    sampler = TransformersSampler(model, byte_tokenizer(), SamplingConfig(max_new_tokens=40))
    rows = Rows(sampler.decoder(), long_prompts(20, 20, 20), [range(3)] * 3)
    assert rows._shared is not None
    assert rows._shared.layers[0][0].shape[:3] == (3, 2, 20)
    held = []
    while not all(rows.finished):
        rows.draw(1)
        rows.free_finished()
        open_ = {i // 3 for i, done in enumerate(rows.finished) if not done}
        if open_:
            assert rows._shared is not None
            held.append(len(rows._shared.layers[0][0]))
            assert held[-1] == len(open_)
    assert held[-1] < 3
    assert rows._shared is None


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_the_inverse_cdf(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(500, vocabulary, generator=generator, dtype=dtype)
    logits[:, ::3] = -torch.inf
    if vocabulary == 1:
        logits[:] = 0.0
    log_probs = logits.log_softmax(-1)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    cdf = np.cumsum(log_probs.double().exp().numpy(), axis=-1)
    cdf /= cdf[:, -1:]
    expected = [np.searchsorted(row, u, side="right") for row, u in zip(cdf, uniforms, strict=True)]
    found = draw_tokens(log_probs, uniforms)
    agree = (found.numpy() == np.array(expected)).mean()
    assert agree == 1 if dtype == torch.float64 else agree > 0.995
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(250)
    drawn_there = draw_tokens(log_probs, edges)
    assert bool(log_probs.gather(-1, drawn_there[:, None]).isfinite().all())


class Doubled(torch.nn.Linear):
    """A subclass, whose forward is its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("bias", [False, True])
def test_fast_linear_layers_compute_the_same_and_are_put_back(bias: bool) -> None:
    layers = [torch.nn.Linear(96, 160, bias=bias), Doubled(160, 160, bias=bias)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(160, 4, bias=bias))
    inputs = torch.randn(5, 11, 96)
    with torch.inference_mode():
        expected = [model(inputs), model(inputs[:1, :1])]
        with fast_linear(model), fast_linear(model):
            replaced = ["forward" in vars(layer) for layer in model]
            found = [model(inputs), model(inputs[:1, :1])]
    assert replaced in ([True, False, False], [False] * 3)  # as the processor is
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not any("forward" in vars(layer) for layer in model)


# --- stop strings ---------------------------------------------------------------------------------


@given(st.text("ab.", max_size=12), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
def test_the_first_stop_string_cuts(text: str, stop: list[str]) -> None:
    cut = cut_at_stop(text, stop)
    if cut is None:
        assert not any(string in text for string in stop)
    else:
        assert text.startswith(cut)
        assert not any(string in cut for string in stop)
        assert any(text[len(cut) :].startswith(string) for string in stop)


@pytest.mark.parametrize("stop", [(".",), (" the", "Lily"), ("\n", "He ")])
def test_rows_end_at_a_stop_string(shared: Any, stop: tuple[str, ...]) -> None:
    model, tokenizer = load_policy(str(shared / "models" / "stories260K"), device="cpu")
    config = SamplingConfig(n=8, max_new_tokens=60)
    whole_source = LocalSource(model, tokenizer, config)
    source = LocalSource(model, tokenizer, config, stop)
    prompts = source.encode([_row("a", "Once upon a time"), _row("b", "The cat was")])
    whole = [found.group for found in whole_source.draw(prompts, [range(8)] * 2)]
    stopped = [found.group for found in source.draw(prompts, [range(8)] * 2)]
    some = 0
    for long, short in zip(whole, stopped, strict=True):
        for k in range(8):
            expected = cut_at_stop(long.completions[k], stop)
            some += expected is not None
            assert short.completions[k] == (long.completions[k] if expected is None else expected)
            # Not one token is drawn beyond the one that completes the stop string.
            ids = short.token_ids[k]
            assert long.token_ids[k][: len(ids)] == ids
            if expected is not None:
                assert short.finish_reasons[k] == "stop"
                before = completion_text(tokenizer, short.prompt_token_ids, ids[:-1])
                assert cut_at_stop(before, stop) is None
    assert some > 4


def _row(prompt_id: str, text: str) -> Any:
    from bonbon.groups.prompts import PromptRow

    return PromptRow(prompt_id, text)


# --- embeddings -----------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_completion_s_hidden_states(
    model: LlamaForCausalLM,
) -> None:
    source = source_of(model, n=5, max_new_tokens=7)
    (found,) = source.draw([PROMPT], [range(5)])
    embedded = source.embed(found.group)
    assert len(found.group.token_ids) == 5
    for k, ids in enumerate(found.group.token_ids):
        with torch.inference_mode():
            out = model(torch.tensor([[*PROMPT.token_ids, *ids]]), output_hidden_states=True)
        hidden = out.hidden_states[-1][0, len(PROMPT.token_ids) :]
        np.testing.assert_allclose(embedded[k], hidden.mean(dim=0).numpy(), atol=1e-6)
