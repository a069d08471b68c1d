"""The layouts of a group and the chunked head give one answer: values and gradients."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bonbon.models import group_logprobs, logprobs
from bonbon.models.forward import supports_cached_prompt
from bonbon.models.group_logprobs import (
    GroupRows,
    group_log_probs,
    group_rows,
    supports_packed_rows,
    supports_shared_prompt,
)
from bonbon.models.logprobs import completion_log_probs
from bonbon.models.padding import Tokens, pad_rows
from bonbon.objectives.pairs import bonbon
from support.models import tiny_llama_config

Prompts = Sequence[Tokens]
Completions = Sequence[Sequence[Tokens]]

# Prompts of 1, 5 and 12 tokens; completions of 1 to 9 tokens.
LENGTHS = {
    1: ((3,), (9,), (1,)),
    3: ((3, 8, 1), (2, 5, 4), (7, 1, 1)),
    8: ((3, 8, 1, 1, 2, 9, 4, 6), (1,) * 8, (5, 4, 3, 2, 1, 2, 3, 4)),
}


def random_rows(m: int, prompts: Sequence[int] = (5, 1, 12), vocabulary: int = 99) -> GroupRows:
    generator = torch.Generator().manual_seed(m)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    completions = [[tokens(length) for length in lengths] for lengths in LENGTHS[m]]
    return group_rows([tokens(length) for length in prompts], completions, 0)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in chunks of seven or so positions, whatever the vocabulary here."""
    monkeypatch.setattr(logprobs, "_LOGITS", 2_000)
    monkeypatch.setattr(logprobs, "_CPU_LOGITS", 2_000)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(**changes))


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def loss_and_gradient(model: nn.Module, log_probs: torch.Tensor) -> Result:
    """The values and the gradient of BoNBoN's loss, or of a mixture where there is no pair."""
    if log_probs.shape[1] > 1:
        best, worst = log_probs[:, 0], log_probs[:, 1]
        loss = bonbon(best, worst, best.detach() + 1, worst.detach() - 2, n=8, alpha=0.1).sum()
        loss = loss + (log_probs * torch.linspace(-1, 1, log_probs.shape[1])).sum()
    else:
        loss = log_probs.sum()
    model.zero_grad()
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([loss.detach()[None], log_probs.detach().flatten()]), named


def assert_same(ours: Result, reference: Result, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the scale: of the largest value, and of the largest gradient."""
    values, gradients = reference
    scale = float(values.abs().max())
    torch.testing.assert_close(ours[0], values, atol=tolerance * scale, rtol=0)
    assert ours[1].keys() == gradients.keys()
    steepest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert steepest > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            ours[1][name], gradient, atol=tolerance * steepest, rtol=0, msg=name
        )


def assert_sharing_is_the_same(model: nn.Module, rows: GroupRows, temperature: float = 1.0) -> None:
    assert supports_cached_prompt(model)
    padded = loss_and_gradient(model, group_log_probs(model, rows, temperature))
    shared = loss_and_gradient(model, group_log_probs(model, rows, temperature, share_prompt=True))
    assert_same(shared, padded)


# --- the prompt's keys and values -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_a_prompt_computed_once(m: int, temperature: float) -> None:
    assert_sharing_is_the_same(tiny_llama(), random_rows(m), temperature)


def test_padding_is_what_each_row_alone_gives() -> None:
    model, rows = tiny_llama(), random_rows(3)
    found = group_log_probs(model, rows, share_prompt=True).detach()
    for g in range(3):
        prompt = rows.prompt_ids[g][rows.prompt_mask[g] > 0]
        for k in range(3):
            ids = rows.completion_ids[g, k][rows.completion_mask[g, k] > 0]
            logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
            alone = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
            assert float(found[g, k]) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_all_prompts_of_a_single_token() -> None:
    assert_sharing_is_the_same(tiny_llama(), random_rows(3, prompts=(1, 1, 1)))


def test_a_pretrained_model(stories260k: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    assert_sharing_is_the_same(model, random_rows(8))


def test_bfloat16_differs_by_its_rounding_alone() -> None:
    model, rows = tiny_llama().bfloat16(), random_rows(3)
    ways = [group_log_probs(model, rows, share_prompt=share) for share in (False, True)]
    assert {way.dtype for way in ways} == {torch.float32}
    torch.testing.assert_close(*ways, atol=0, rtol=0.05)


SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "initializer_range": 0.3}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2}
WIDE: dict[str, Any] = {"intermediate_size": 32, "max_position_embeddings": 64}


def mistral(window: int | None) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(sliding_window=window, num_key_value_heads=1, **SIZES, **HEADS, **WIDE)
    return MistralForCausalLM(config)


def gemma2() -> nn.Module:
    """Sliding and full layers in turn, attention and logits capped, head and embeddings tied."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        sliding_window=4, head_dim=8, num_key_value_heads=1, final_logit_softcapping=5.0,
        **SIZES, **HEADS, **WIDE,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def falcon(alibi: bool) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(alibi=alibi, new_decoder_architecture=False, **SIZES, **HEADS)
    return FalconForCausalLM(config)


def gpt2() -> nn.Module:
    """Learned positions, as many as the longest row has tokens: padding must not go past them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=19, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    "build",
    [lambda: mistral(None), lambda: mistral(4), gemma2, lambda: falcon(True), gpt2],
    ids=["full", "window", "windows and caps", "alibi", "learned positions"],
)
def test_other_kinds_of_attention(build: Any, chunked: None) -> None:
    torch.manual_seed(0)
    # Dropout is the trainer's to turn off.
    assert_sharing_is_the_same(build().eval(), random_rows(3))


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def test_an_adapter_shares_the_prompt() -> None:
    assert_sharing_is_the_same(lora(tiny_llama(), target_modules="all-linear"), random_rows(3))


def test_what_does_not_share_the_prompt() -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    checkpointed = tiny_llama()
    checkpointed.gradient_checkpointing_enable()
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16}
    for model in (
        checkpointed,
        get_peft_model(tiny_llama(), virtual),
        BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, **sizes)),
        MambaForCausalLM(MambaConfig(num_hidden_layers=1, state_size=4, **sizes)),
    ):
        assert not supports_shared_prompt(model)


# --- packed rows ----------------------------------------------------------------------------------


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention as PyTorch's uncompiled operator, whose backward pass works on a CPU too.

    PyTorch refuses it there by a check of the device alone, since the compiled one has none.
    """
    from transformers.integrations import flex_attention as integration

    def not_compiled(*tensors: torch.Tensor, training: bool = False, **options: Any) -> Any:
        return flex.flex_attention(*tensors, **options)

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", not_compiled)
    monkeypatch.setattr(group_logprobs, "supports_packed_rows", lambda model: True)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_one_packed_row_a_prompt(m: int, flex_on_cpu: None) -> None:
    model, rows = tiny_llama(), random_rows(m)
    padded = loss_and_gradient(model, group_log_probs(model, rows))
    model.set_attn_implementation("flex_attention")
    packed = loss_and_gradient(model, group_log_probs(model, rows, share_prompt=True))
    assert_same(packed, padded)


def test_packed_rows_past_one_block_of_the_mask(flex_on_cpu: None, chunked: None) -> None:
    model = tiny_llama(max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    lengths = [[100, 40, 60], [7, 90, 100]]
    rows = group_rows(
        [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (150, 40)],
        [[torch.randint(3, 259, (n,), generator=generator).tolist() for n in g] for g in lengths],
        0,
    )
    padded = loss_and_gradient(model, group_log_probs(model, rows))
    model.set_attn_implementation("flex_attention")
    assert_same(loss_and_gradient(model, group_log_probs(model, rows, share_prompt=True)), padded)


def test_rows_are_not_packed_on_a_cpu() -> None:
    model = tiny_llama()
    model.set_attn_implementation("flex_attention")
    assert not supports_packed_rows(model)
    assert supports_shared_prompt(model)  # by its keys and values


@pytest.mark.parametrize(
    ("build", "packs"),
    [(lambda: mistral(None), True), (lambda: mistral(4), False), (gemma2, False)],
    ids=["full", "window", "windows and caps"],
)
def test_rows_are_packed_for_full_attention_by_flex_alone(
    build: Any, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    weight = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([weight]))
    assert not supports_packed_rows(model)
    model.set_attn_implementation("flex_attention")
    assert supports_packed_rows(model) == packs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex attention needs a GPU")
@pytest.mark.parametrize("m", [1, 8])
def test_packed_rows_on_a_gpu(m: int) -> None:
    model = tiny_llama(hidden_size=64).cuda()
    rows = GroupRows(*(tensor.cuda() for tensor in vars(random_rows(m)).values()))
    padded = loss_and_gradient(model, group_log_probs(model, rows))
    model.set_attn_implementation("flex_attention")
    assert supports_packed_rows(model)
    packed = loss_and_gradient(model, group_log_probs(model, rows, share_prompt=True))
    assert_same(packed, padded)


# --- the head in chunks ---------------------------------------------------------------------------


def grouped(model: nn.Module, share_prompt: bool = False, temperature: float = 0.7) -> Result:
    log_probs = group_log_probs(model, random_rows(8), temperature, share_prompt)
    return loss_and_gradient(model, log_probs)


def directly_then_chunked(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, share_prompt: bool = False
) -> tuple[Result, Result, list[int]]:
    """Both results, and the sizes of the second one's logits."""
    direct = grouped(model, share_prompt)
    sizes: list[int] = []
    real = logprobs.token_log_probs

    def watched(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(logits.numel())
        return real(logits, *rest)

    monkeypatch.setattr(logprobs, "token_log_probs", watched)
    monkeypatch.setattr(logprobs, "_LOGITS", 2_000)
    monkeypatch.setattr(logprobs, "_CPU_LOGITS", 2_000)
    return direct, grouped(model, share_prompt), sizes


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **SIZES, **HEADS))


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        tiny_llama,
        lambda: tiny_llama(tie_word_embeddings=True),
        lambda: lora(tiny_llama(), target_modules=["q_proj"]),
        lambda: lora(tiny_llama(), target_modules=["q_proj", "lm_head"]),
        lambda: lora(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
        gpt_neox,
        gpt2,
    ],
    ids=["untied", "tied", "lora", "lora on the head", "head saved whole", "neox", "gpt2"],
)
def test_the_head_in_chunks(
    build: Any, share_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build().eval()
    direct, chunked, sizes = directly_then_chunked(model, monkeypatch, share_prompt)
    assert_same(chunked, direct)
    assert max(sizes) <= 2_000
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_head_in_chunks_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    direct, chunked, _ = directly_then_chunked(tiny_llama().double(), monkeypatch)
    assert chunked[0].dtype == torch.float64
    assert_same(chunked, direct, 1e-13)


def test_without_gradient_the_chunks_give_the_same(
    chunked: None,
) -> None:
    model, rows = tiny_llama(), random_rows(3)
    with torch.no_grad():
        without = group_log_probs(model, rows)
    torch.testing.assert_close(without, group_log_probs(model, rows).detach())


def test_checkpointed_layers_and_a_head_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().train()
    direct = grouped(model)
    model.gradient_checkpointing_enable()
    _, chunked, sizes = directly_then_chunked(model, monkeypatch)
    assert max(sizes) <= 2_000
    assert_same(chunked, direct)


def test_mixed_precision_computes_the_chunks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_llama()
    # As accelerate prepares a model for bf16.
    autocast = torch.autocast("cpu", torch.bfloat16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))
    direct, chunked, sizes = directly_then_chunked(model, monkeypatch)
    assert max(sizes) <= 2_000
    assert_same(chunked, direct, 0.02)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_distributed_models_chunk_and_share(
    share_prompt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import distributed

    model = tiny_llama()
    direct = grouped(model, share_prompt)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        _, (values, gradients), sizes = directly_then_chunked(wrapped, monkeypatch, share_prompt)
        # Its last reference to the group must not be dropped after the group has been left: the
        # group's destructor then may wait for a thread that waits for Python.
        del wrapped
        gc.collect()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    assert max(sizes) <= 2_000
    plain = {name.removeprefix("module."): value for name, value in gradients.items()}
    assert_same((values, plain), direct)


class ChangesLogits(LlamaForCausalLM):
    """Does something to its head's output that its configuration does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 0.5,
        lambda logits: logits.mul_(0.5),
        lambda logits: logits[:, :, :90],
    ],
    ids=["scaled", "scaled in place", "cut"],
)
def test_a_head_whose_output_is_changed_is_left_alone(
    change: Any, share_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ChangesLogits(tiny_llama_config(vocab_size=99))
    model.change = change
    rows = random_rows(3, vocabulary=90)
    direct = loss_and_gradient(model, group_log_probs(model, rows, 1.0, share_prompt))
    monkeypatch.setattr(logprobs, "_LOGITS", 2_000)
    assert_same(
        loss_and_gradient(model, group_log_probs(model, rows, 1.0, share_prompt)), direct, 1e-7
    )


def test_capped_logits_cost_no_second_pass(chunked: None) -> None:
    torch.manual_seed(0)
    model, passes = gemma2().eval(), []
    model.register_forward_hook(lambda *seen: passes.append(seen[-1].logits.shape))
    group_log_probs(model, random_rows(3))
    assert passes == [(9, 8, 99)]


def test_a_failing_forward_pass_leaves_the_model_as_it_was(chunked: None) -> None:
    model, rows = tiny_llama(), random_rows(3)
    expected = group_log_probs(model, rows)
    rows.completion_ids[0, 0, 0] = 1_000  # no such token
    with pytest.raises(IndexError):
        group_log_probs(model, rows)
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks
    torch.testing.assert_close(group_log_probs(model, random_rows(3)), expected)


def test_completions_of_rows_in_chunks(chunked: None) -> None:
    model = tiny_llama()
    prompts, completions = [[5, 6], [7]], [[8] * 9, [9, 10]]
    found = completion_log_probs(model, pad_rows(prompts, completions, 0))
    alone = [
        completion_log_probs(model, pad_rows([x], [y], 0))
        for x, y in zip(prompts, completions, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone))
