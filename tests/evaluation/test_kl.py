"""KL estimates against a policy enumerated in full."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from bonbon.config.sampling import SamplingConfig
from bonbon.evaluation import completion_kls
from bonbon.evaluation.kl import ESTIMATES, _step_kls
from bonbon.groups.group import Group
from bonbon.sampling.distribution import warped_log_probs

Floats = NDArray[np.float64]

VOCABULARY, END, LONGEST = 5, 0, 3
PROMPT = (3, 1)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        pad_token_id=END, eos_token_id=END, bos_token_id=None, initializer_range=0.8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def every_completion() -> list[tuple[int, ...]]:
    """All the policy can draw: up to LONGEST tokens, ended by END or cut off."""
    words = [token for token in range(VOCABULARY) if token != END]
    ended = [
        (*prefix, END) for k in range(LONGEST) for prefix in itertools.product(words, repeat=k)
    ]
    return ended + list(itertools.product(words, repeat=LONGEST))


@torch.inference_mode()
def log_prob(model: LlamaForCausalLM, completion: tuple[int, ...], temperature: float) -> float:
    """Token by token, without batching, padding or a mask."""
    total = 0.0
    for t, token in enumerate(completion):
        logits = model(torch.tensor([[*PROMPT, *completion[:t]]])).logits[0, -1].double()
        total += float((logits / temperature).log_softmax(dim=-1)[token])
    return total


def everything(model: LlamaForCausalLM, temperature: float = 1.0) -> tuple[Group, Floats]:
    """All that can be drawn, and its exact log-probabilities."""
    completions = every_completion()
    logprobs = np.array([log_prob(model, y, temperature) for y in completions])
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-5)  # the enumeration is complete
    size = len(completions)
    group = Group(
        "p", "p", PROMPT, ("",) * size, tuple(completions), (0.0,) * size, ("stop",) * size
    )
    return group, logprobs


def moments(weights: Floats, values: tuple[float, ...]) -> tuple[float, float]:
    mean = float(weights @ np.array(values))
    return mean, float(weights @ (np.array(values) - mean) ** 2)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_batch_tokens", [16_384, 12])
def test_all_three_are_unbiased_both_ways(temperature: float, max_batch_tokens: int) -> None:
    """Their means under the drawing policy are Σ_y p(y) ln[p(y)/q(y)] over all completions."""
    first, second = tiny_llama(0), tiny_llama(1)
    sampling = SamplingConfig(temperature=temperature)
    for policy, base in ((first, second), (second, first)):
        group, ours = everything(policy, temperature)
        _, theirs = everything(base, temperature)
        (kls,) = completion_kls(
            policy, base, [group], sampling=sampling, max_batch_tokens=max_batch_tokens
        )
        exact = float(np.exp(ours) @ (ours - theirs))
        assert exact > 0.05  # the two models differ enough for the test to mean something
        for name in ESTIMATES:
            mean, _ = moments(np.exp(ours), getattr(kls, name))
            assert mean == pytest.approx(exact, rel=1e-4), name
        assert kls.plain == pytest.approx(ours - theirs, abs=1e-4)
        assert min(kls.rao_blackwellised) >= 0
        assert min(kls.k3) > -1e-6


def test_their_variances_are_ordered_for_close_models() -> None:
    """Rao-Blackwellised < k3 < plain, exactly enumerated, as the policy nears the base."""
    base = tiny_llama(1)
    for distance in (0.02, 0.1):
        policy = tiny_llama(1)
        noise = tiny_llama(7).state_dict()
        mixed = {k: torch.lerp(v, noise[k], distance) for k, v in base.state_dict().items()}
        policy.load_state_dict(mixed)
        group, ours = everything(policy)
        (kls,) = completion_kls(policy, base, [group])
        spread = {name: moments(np.exp(ours), getattr(kls, name))[1] for name in ESTIMATES}
        assert spread["rao_blackwellised"] < spread["k3"] < spread["plain"]
        assert spread["rao_blackwellised"] < 0.3 * spread["plain"]
        print(distance, spread)


def test_the_order_is_no_theorem_for_whole_completions() -> None:
    """A log-ratio that a later step always makes up for: the plain estimate has no variance.

    First step: p = (½, ½) against q = (½e^−a, rest); second step: after the first token p and q
    agree, after the other p is certain of a token that q gives the probability e^−c, with c such
    that both completions have the same log-ratio.
    """
    p1, q1 = np.array([0.5, 0.5]), np.array([0.2, 0.8])
    first = np.log(p1 / q1)
    later = np.array([0.0, first[0] - first[1]])  # ln p/q of the second step, certain under p
    plain, rao = first + later, p1 @ first + later
    assert np.ptp(plain) == pytest.approx(0)
    assert np.ptp(rao) > 1
    assert p1 @ plain == pytest.approx(p1 @ rao)


def test_a_policy_that_cannot_draw_all_that_the_base_can() -> None:
    """With top-k on the policy alone: two estimates stay unbiased, k3 misses the lost mass."""
    model, base = tiny_llama(0), tiny_llama(1)
    logits = torch.randn(400, VOCABULARY, generator=torch.Generator().manual_seed(0))
    other = torch.randn(400, VOCABULARY, generator=torch.Generator().manual_seed(1))
    ours = warped_log_probs(logits, SamplingConfig(top_k=2)).double()
    theirs = other.log_softmax(-1).double()
    weights = ours.exp()
    found: dict[str, Any] = {name: torch.zeros(400).double() for name in ESTIMATES}
    for token in range(VOCABULARY):
        steps = _step_kls(ours, theirs, torch.full((400,), token))
        for name in ESTIMATES:
            kept = weights[:, token] > 0
            found[name][kept] += weights[kept, token] * steps[name][kept].double()
    exact = torch.where(weights > 0, weights * (ours - theirs), 0.0).sum(-1)
    assert torch.allclose(found["rao_blackwellised"], exact)
    assert torch.allclose(found["plain"], exact)
    lost = torch.where(weights > 0, 0.0, theirs.exp()).sum(-1)
    assert torch.allclose(found["k3"], exact - lost)
    # And through a model: the KL of the cut policy from the whole base is finite and positive.
    group = Group("p", "p", PROMPT, ("",), ((1, 2, 0),), (0.0,), ("stop",))
    whole = SamplingConfig()
    (kls,) = completion_kls(
        model, base, [group], sampling=SamplingConfig(top_k=2), base_sampling=whole
    )
    (uncut,) = completion_kls(model, base, [group], sampling=whole)
    assert math.isfinite(kls.rao_blackwellised[0])
    assert kls.rao_blackwellised[0] != pytest.approx(uncut.rao_blackwellised[0], rel=1e-3)


def test_a_cut_that_is_computed_again_keeps_the_drawn_token() -> None:
    """In 16 bits another batch may cut one token short; what was drawn was inside."""
    logits = torch.tensor([[2.0, 1.999, -1.0, 0.5]])
    drawn = torch.tensor([1])
    for cut in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.2, temperature=0.5)):
        assert warped_log_probs(logits, cut)[0, 1] == -torch.inf
        kept = warped_log_probs(logits, cut, drawn)
        two = (logits[:, :2] / cut.temperature).log_softmax(-1)
        assert torch.allclose(kept[:, :2], two)
        assert torch.all(kept[:, 2:] == -torch.inf)
    whole = SamplingConfig(temperature=0.5)
    assert torch.equal(warped_log_probs(logits, whole, drawn), warped_log_probs(logits, whole))


def test_heads_of_different_width_are_cut_to_the_narrower() -> None:
    base = tiny_llama(1)
    torch.manual_seed(5)
    config = LlamaConfig(**(base.config.to_dict() | {"vocab_size": VOCABULARY + 3}))
    wide = LlamaForCausalLM(config).eval()
    state = wide.state_dict()
    for name, value in tiny_llama(0).state_dict().items():
        state[name][: len(value)] = value
    wide.load_state_dict(state)
    group = Group("p", "p", PROMPT, ("",) * 2, ((1, 2, 0), (3, 0)), (0.0,) * 2, ("stop",) * 2)
    (narrow,) = completion_kls(tiny_llama(0), base, [group])
    for pair in ((wide, base), (base, wide)):
        (kls,) = completion_kls(*pair, [group])
        assert all(math.isfinite(kl) for kl in kls.rao_blackwellised)
    (kls,) = completion_kls(wide, base, [group])
    assert kls.rao_blackwellised == pytest.approx(narrow.rao_blackwellised, rel=1e-4)
    assert kls.plain == pytest.approx(narrow.plain, rel=1e-4)


def test_own_temperatures() -> None:
    """A policy that is its base at another temperature has the KL that enumeration says."""
    model = tiny_llama(0)
    group, ours = everything(model, 0.5)
    _, theirs = everything(model, 1.0)
    (kls,) = completion_kls(
        model,
        model,
        [group],
        sampling=SamplingConfig(temperature=0.5),
        base_sampling=SamplingConfig(),
    )
    exact = float(np.exp(ours) @ (ours - theirs))
    assert exact > 0.01
    assert moments(np.exp(ours), kls.rao_blackwellised)[0] == pytest.approx(exact, rel=1e-4)


def test_completion_kls_of_the_base_itself() -> None:
    model = tiny_llama(0)
    groups = [
        Group("p", "p", PROMPT, ("", ""), ((1, 0), (2, 2, 2)), (0.0,) * 2, ("stop", "length")),
        Group("q", "q", (1,), ("",), ((4, 0),), (0.0,), ("stop",)),
    ]
    got = completion_kls(model, model, groups)
    assert [len(kls.plain) for kls in got] == [2, 1]
    for kls in got:
        for name in ESTIMATES:
            assert getattr(kls, name) == pytest.approx([0.0] * len(kls.plain), abs=1e-6)
