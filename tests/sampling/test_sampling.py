"""The sampler draws from the model's own distribution, exactly and reproducibly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import processors
from transformers import DynamicCache, LlamaForCausalLM

from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.models.growing_cache import BlockGrowingLayer, block_growing_cache
from bonbon.models.loading import load_policy
from bonbon.sampling.distribution import draw_tokens
from bonbon.sampling.encoding import encode_prompts
from bonbon.sampling.random_streams import uniform_stream
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError
from support.models import EOS, byte_tokenizer, tiny_llama_config

VOCABULARY = 6
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def small_vocabulary_model(dtype: torch.dtype = torch.float32, seed: int = 3) -> LlamaForCausalLM:
    """Six tokens, the end token among them, so that short completions can be enumerated."""
    torch.manual_seed(seed)
    config = tiny_llama_config(vocab_size=VOCABULARY, initializer_range=0.6)
    return LlamaForCausalLM(config).to(dtype).eval()


def sampler_of(model: LlamaForCausalLM, **settings: Any) -> TransformersSampler:
    return TransformersSampler(model, byte_tokenizer(), SamplingConfig(**settings))


def plain_log_probs(model: Any, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Log-softmax of a forward pass without padding, cache or batch: (tokens, vocabulary)."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def summed(model: Any, group: Group, k: int) -> float:
    log_probs = plain_log_probs(model, group.prompt_token_ids, group.token_ids[k])
    return float(log_probs.gather(-1, torch.tensor(group.token_ids[k])[:, None]).sum())


def prompts_of(*lengths: int) -> list[EncodedPrompt]:
    generator = np.random.default_rng(0)
    return [
        EncodedPrompt(f"p{i}", "x", tuple(generator.integers(3, VOCABULARY, length).tolist()))
        for i, length in enumerate(lengths)
    ]


def enumerated(model: Any, prompt: tuple[int, ...], longest: int) -> dict[tuple[int, ...], float]:
    """The probability of every completion of at most `longest` tokens."""
    done: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(longest):
        grown: dict[tuple[int, ...], float] = {}
        for ids, probability in open_.items():
            following = plain_log_probs(model, prompt, (*ids, 0))[-1].exp()
            for token, p in enumerate(following.tolist()):
                (done if token == EOS else grown)[(*ids, token)] = probability * p
        open_ = grown
    return done | open_


def test_frequencies_match_exact_probabilities() -> None:
    model = small_vocabulary_model()
    (prompt,) = prompts_of(3)
    draws = 20_000
    (group,) = sampler_of(model, n=draws, max_new_tokens=3).sample([prompt])
    exact = enumerated(model, prompt.token_ids, 3)
    assert sum(exact.values()) == pytest.approx(1)
    counts = Counter(group.token_ids)
    assert set(counts) <= set(exact)
    # Cells with too few expected draws are put together, as the chi-square test asks for.
    large = {ids for ids, p in exact.items() if p * draws >= 10}
    observed = [counts[ids] for ids in large]
    expected = [exact[ids] * draws for ids in large]
    observed.append(draws - sum(observed))
    expected.append(draws - sum(expected))
    assert len(observed) > 30
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.5}]
)
def test_logprobs_are_those_of_the_settings(settings: dict[str, Any]) -> None:
    model = small_vocabulary_model()
    groups = sampler_of(model, n=16, max_new_tokens=12, **settings).sample(prompts_of(2, 9, 5))
    assert [len(group.token_ids) for group in groups] == [16] * 3
    for group in groups:
        for k, ids in enumerate(group.token_ids):
            log_probs = plain_log_probs(model, group.prompt_token_ids, ids)
            scores = log_probs / settings.get("temperature", 1.0)
            if "top_k" in settings:
                kept = scores.topk(settings["top_k"]).values[:, -1:]
                scores = scores.masked_fill(scores < kept, -torch.inf)
            if "top_p" in settings:
                ordered, order = scores.softmax(-1).sort(-1, descending=True)
                # The smallest set of likeliest tokens whose mass reaches top-p.
                outside = (ordered.cumsum(-1) - ordered >= settings["top_p"]).gather(
                    -1, order.argsort(-1)
                )
                scores = scores.masked_fill(outside, -torch.inf)
            picked = scores.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()
            assert group.logprobs[k] == pytest.approx(float(picked), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_batch_size_changes_nothing(dtype: torch.dtype) -> None:
    model = small_vocabulary_model(dtype)
    prompts = prompts_of(*range(1, 17))
    one = sampler_of(model, n=4, max_new_tokens=16, max_batch_tokens=1).sample(prompts)
    many = sampler_of(model, n=4, max_new_tokens=16, max_batch_tokens=64 * 32).sample(prompts)
    assert [g.token_ids for g in one] == [g.token_ids for g in many]
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("end_bias", [0.0, -4.0], ids=["often", "seldom"])
def test_rows_stop_at_the_end_token_and_only_there(end_bias: float) -> None:
    # Where rows end seldom, finished ones stay in the batch for a while and must stay silent.
    model = small_vocabulary_model()
    head = torch.nn.Linear(16, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[EOS] = end_bias
    model.lm_head = head
    groups = sampler_of(model, n=64, max_new_tokens=3).sample(prompts_of(1, 4, 7))
    reasons = Counter(reason for group in groups for reason in group.finish_reasons)
    assert reasons["stop"] > 5
    assert reasons["length"] > 5
    for group in groups:
        for ids, reason in zip(group.token_ids, group.finish_reasons, strict=True):
            assert EOS not in ids[:-1]
            assert (ids[-1] == EOS) == (reason == "stop")
            assert reason == "stop" or len(ids) == 3


def test_seed_stream_prompt_and_draw_each_have_their_own_numbers() -> None:
    names = [(s, t, p, k) for s in (0, 1) for t in ("", "a") for p in ("x", "y") for k in (0, 1)]
    firsts = {float(uniform_stream(*name, count=1)[0]) for name in names}
    assert len(firsts) == len(names)
    # A longer stream goes on where a shorter one ends: the limit changes no earlier token.
    np.testing.assert_array_equal(
        uniform_stream(0, "", "x", 0, 4), uniform_stream(0, "", "x", 0, 9)[:4]
    )


def test_a_token_without_probability_is_never_drawn() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.5, 0.5, -torch.inf]]).log_softmax(-1).repeat(3, 1)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(log_probs, ends).tolist() == [1, 2, 2]


def test_the_end_token_at_once_is_an_empty_completion() -> None:
    model = small_vocabulary_model()
    with torch.no_grad():  # a model that always ends
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head = torch.nn.Linear(16, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([-50.0] * EOS + [50.0] + [-50.0] * 3))
    (group,) = sampler_of(model, n=3, max_new_tokens=5).sample(prompts_of(2))
    assert group.token_ids == ((EOS,),) * 3
    assert group.completions == ("",) * 3
    assert group.finish_reasons == ("stop",) * 3
    np.testing.assert_allclose(group.logprobs, 0, atol=1e-6)


def test_a_prompt_is_prefilled_once_for_all_its_completions() -> None:
    model = small_vocabulary_model()
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    sampler_of(model, n=8, max_new_tokens=4).sample(prompts_of(7, 7))
    assert seen[0] == (2, 7)
    assert all(width == 1 for _, width in seen[1:])


def test_models_whose_states_cannot_be_expanded_are_sampled_too() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        eos_token_id=EOS,
        initializer_range=0.6,
    )
    model = Lfm2ForCausalLM(config).eval()
    groups = sampler_of(model, n=4, max_new_tokens=8).sample(prompts_of(3, 6))
    assert len(groups) == 2
    for group in groups:
        for k in range(4):
            assert group.logprobs[k] == pytest.approx(summed(model, group, k), abs=1e-4)


def test_the_block_growing_cache_holds_what_the_dynamic_one_does() -> None:
    model = small_vocabulary_model()
    plain, growing = DynamicCache(config=model.config), block_growing_cache(model.config)
    assert all(isinstance(layer, BlockGrowingLayer) for layer in growing.layers)
    generator = torch.Generator().manual_seed(0)

    def grow(rows: int, columns: int) -> None:
        for layer in range(2):
            new = torch.randn(2, rows, 2, columns, 8, generator=generator)
            expected = plain.update(new[0], new[1], layer)
            found = growing.update(new[0], new[1], layer)
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    grow(3, 5)
    for cache in (plain, growing):
        cache.batch_repeat_interleave(2)
    for _ in range(70):  # past a block's end
        grow(6, 1)
    for cache in (plain, growing):
        cache.batch_select_indices(torch.tensor([0, 4]))
    grow(2, 1)
    assert growing.get_seq_length() == plain.get_seq_length() == 76


# --- prompts to tokens ----------------------------------------------------------------------------


def test_a_text_is_taken_as_it_is_and_messages_go_through_the_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [
        PromptRow("text", "<user>hi"),
        PromptRow("chat", [{"role": "user", "content": "hi"}]),
    ]
    text, chat = encode_prompts(rows, tokenizer, max_tokens=None)
    assert tokenizer.decode(text.token_ids, skip_special_tokens=True) == "<user>hi"
    assert tokenizer.decode(chat.token_ids, skip_special_tokens=True) == "<user>hi<assistant>"


def test_a_tokenizer_s_own_end_token_is_taken_off_and_a_prompt_s_is_not() -> None:
    tokenizer = byte_tokenizer()
    plain, ended = encode_prompts(
        [PromptRow("a", "Hi"), PromptRow("b", "Hi</s>")], tokenizer, max_tokens=None
    )
    assert plain.token_ids[-1] != EOS
    assert ended.token_ids == (*plain.token_ids, EOS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    closing = encode_prompts([PromptRow("a", "Hi")], tokenizer, max_tokens=None)
    assert closing[0].token_ids == plain.token_ids


def test_a_template_that_refuses_a_conversation_is_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    rows = [PromptRow("chat", [{"role": "system", "content": "be kind"}])]
    with pytest.raises(BonbonError, match=r"refuses .*be kind.*System role not supported"):
        encode_prompts(rows, tokenizer, max_tokens=None)


def test_messages_without_a_template_are_refused() -> None:
    rows = [PromptRow("chat", [{"role": "user", "content": "hi"}])]
    with pytest.raises(BonbonError, match="prompt chat is a list of messages"):
        encode_prompts(rows, byte_tokenizer(), max_tokens=None)


def test_long_prompts_are_listed_skipped_or_cut_at_their_beginning() -> None:
    rows = [PromptRow("short", "ab"), PromptRow("long", "abcdefgh"), PromptRow("longer", "x" * 20)]
    tokenizer = byte_tokenizer()
    with pytest.raises(BonbonError, match=r"2 prompts .*long \(9 tokens\), longer \(21 tokens\)"):
        encode_prompts(rows, tokenizer, max_tokens=5)
    skipped = encode_prompts(rows, tokenizer, max_tokens=5, on_long_prompt="skip")
    assert [prompt.prompt_id for prompt in skipped] == ["short"]
    cut = encode_prompts(rows, tokenizer, max_tokens=5, on_long_prompt="truncate")
    assert [len(prompt.token_ids) for prompt in cut] == [3, 5, 5]
    assert tokenizer.decode(cut[1].token_ids) == "<s>efgh"  # the begin token stays


# --- a real model ---------------------------------------------------------------------------------


def test_a_real_model_end_to_end(stories260k: Path) -> None:
    model, tokenizer = load_policy(str(stories260k), dtype="float32")
    texts = ["Once upon a time", "One day, a dog", "Lily and Tom went to the park and saw a"]
    rows = [PromptRow(str(i), text) for i, text in enumerate(texts)]
    sampler = TransformersSampler(model, tokenizer, SamplingConfig(n=4, max_new_tokens=40))
    groups = sampler.sample(sampler.encode(rows))
    assert [len(group.token_ids) for group in groups] == [4] * len(texts)
    for group in groups:
        for k, ids in enumerate(group.token_ids):
            assert group.logprobs[k] == pytest.approx(summed(model, group, k), abs=1e-3)
            whole = tokenizer.decode([*group.prompt_token_ids, *ids], skip_special_tokens=True)
            assert whole == str(group.prompt) + group.completions[k]
