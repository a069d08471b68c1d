"""Drawing from and scoring by true vLLM servers, on the demo's two models.

Needs a Python with vLLM, which `make test-vllm` sees to; BONBON_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bonbon.config.reward import RewardServerConfig
from bonbon.config.sampling import ClientSettings, OpenAISamplerConfig, SamplingConfig
from bonbon.demo import REWARD_MODEL, STORY_MODEL
from bonbon.groups.group import Group
from bonbon.groups.prompts import PromptRow
from bonbon.models.loading import load_policy
from bonbon.models.logprobs import token_log_probs
from bonbon.rewards.model import RewardModel
from bonbon.rewards.openai import OpenAIReward
from bonbon.sampling.openai import OpenAISampler
from bonbon.system.errors import BonbonError
from support.vllm_server import SERVER_SETTINGS, Server

ROWS = [
    PromptRow("cat", "Once upon a time, there was a cat who"),
    PromptRow("parrot", "One day, a parrot flew in and said,"),
    PromptRow("elf", "The little elf lost the key to the toy room. He"),
    PromptRow("cake", "Grandma baked a cake, and"),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """The story model's server and the reward model's."""
    logs = tmp_path_factory.mktemp("vllm")
    settings = ("--max-model-len", "200", "--override-generation-config", SERVER_SETTINGS)
    both = (
        Server(STORY_MODEL, logs / "story", *settings),
        Server(REWARD_MODEL, logs / "reward"),
    )
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture(scope="module")
def story() -> Any:
    return load_policy(str(STORY_MODEL), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def local_reward() -> RewardModel:
    return RewardModel.from_pretrained(str(REWARD_MODEL), dtype="float32", device="cpu")


def drawn(
    servers: tuple[Server, Server], tokenizer: Any, rows: Sequence[PromptRow], **sampling: Any
) -> tuple[list[Group], dict[str, Any]]:
    """Groups, and what the sampler says of itself."""
    settings = OpenAISamplerConfig(base_url=servers[0].url)
    config = SamplingConfig(**({"n": 8, "max_new_tokens": 120} | sampling))
    with closing(OpenAISampler(tokenizer, config, settings)) as sampler:
        return sampler.sample(sampler.encode(rows)), sampler.described()


def local_logprob(model: Any, group: Group, k: int) -> float:
    ids = group.token_ids[k]
    with torch.inference_mode():
        logits = model(torch.tensor([[*group.prompt_token_ids, *ids]])).logits
    return float(token_log_probs(logits[:, -len(ids) - 1 : -1], torch.tensor([ids])).sum())


def test_tokens_and_log_probabilities_are_those_of_the_model(servers: Any, story: Any) -> None:
    model, tokenizer = story
    groups, described = drawn(servers, tokenizer, ROWS)
    assert described["server"] == "vllm"
    assert (described["token_ids"], described["logprobs"]) == ("drawn", "server")
    differences, reasons = [], Counter[str]()
    for row, group in zip(ROWS, groups, strict=True):
        assert group.prompt_token_ids == tuple(tokenizer(row.prompt)["input_ids"])
        assert len(set(group.token_ids)) > 4  # the server's own settings were turned off
        for k, ids in enumerate(group.token_ids):
            whole = tokenizer.decode([*group.prompt_token_ids, *ids], skip_special_tokens=True)
            assert whole == row.prompt + group.completions[k]
            reasons[group.finish_reasons[k]] += 1
            assert (ids[-1] == tokenizer.eos_token_id) == (group.finish_reasons[k] == "stop")
            assert len(ids) == 120 or group.finish_reasons[k] == "stop"
            differences.append(abs(local_logprob(model, group, k) - group.logprobs[k]))
    print(f"largest difference of {len(differences)} sums: {max(differences):.2g} nats")
    assert max(differences) < 1e-3
    assert set(reasons) == {"stop", "length"}


def test_draws_do_not_depend_on_what_shares_a_request(servers: Any, story: Any) -> None:
    """vLLM gives the i-th draw of a request the seed + i; another seed gives other draws."""
    many, _ = drawn(servers, story[1], ROWS, n=11, max_new_tokens=30)
    few, _ = drawn(servers, story[1], ROWS[1:], n=3, max_new_tokens=30)
    for whole, part in zip(many[1:], few, strict=True):
        assert whole.token_ids[:3] == part.token_ids
    other, _ = drawn(servers, story[1], ROWS, n=11, max_new_tokens=30, seed=1)
    assert all(not set(a.token_ids) & set(b.token_ids) for a, b in zip(many, other, strict=True))


def test_first_tokens_have_the_models_frequencies(servers: Any, story: Any) -> None:
    model, tokenizer = story
    (group,), _ = drawn(servers, tokenizer, ROWS[:1], n=1000, max_new_tokens=1)
    with torch.inference_mode():
        logits = model(torch.tensor([group.prompt_token_ids])).logits[0, -1]
    expected = 1000 * logits.double().softmax(-1).numpy()
    counts = np.bincount([ids[0] for ids in group.token_ids], minlength=len(expected))
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    _, p = stats.chisquare(observed, [*expected[common], expected[~common].sum()])
    assert p > 1e-3
    assert common.sum() > 3


def test_other_settings_have_no_log_probabilities(servers: Any, story: Any) -> None:
    groups, described = drawn(servers, story[1], ROWS, temperature=0.5, max_new_tokens=20)
    assert described["logprobs"] == "none"
    assert all(math.isnan(logprob) for group in groups for logprob in group.logprobs)
    (first, *_), _ = drawn(servers, story[1], ROWS, top_k=1, max_new_tokens=20)
    assert len(set(first.token_ids)) == 1


def scored(
    servers: tuple[Server, Server], prompts: Any, completions: Any, api: Any, encode: Any = None
) -> np.ndarray:
    settings = RewardServerConfig(base_url=servers[1].url, api=api)
    with closing(OpenAIReward(settings, encode)) as reward:
        return reward(prompts, completions)


@pytest.mark.parametrize("api", ["pooling", "classify", "score"])
def test_rewards_are_those_of_the_model(
    servers: Any, story: Any, local_reward: RewardModel, api: str
) -> None:
    groups, _ = drawn(servers, story[1], ROWS, max_new_tokens=60)
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [text for group in groups for text in group.completions]
    expected = local_reward(prompts, completions)
    encodings = [None, local_reward.encode]
    for encode in encodings if api != "score" else encodings[:1]:
        found = scored(servers, prompts, completions, api, encode)
        print(f"{api}: largest difference {np.abs(found - expected).max():.2g}")
        assert np.abs(found - expected).max() < 1e-4
    assert len(set(expected)) > 20
    assert expected.min() < 0  # no sigmoid


def test_where_a_server_reads_a_pair_otherwise(servers: Any, local_reward: RewardModel) -> None:
    """Tokens merged across the seam; a text that is cut loses its leading special token too."""
    pairs = [("Hi", "there"), ("One day " * 150, "a cat sat.")]
    prompts, completions = zip(*pairs, strict=True)
    expected = local_reward(prompts, completions)
    joined = scored(servers, prompts, completions, "pooling")
    print(f"differences: {np.abs(joined - expected)}")
    assert abs(joined[0] - expected[0]) > 1  # which the docs warn of
    exact = scored(servers, prompts, completions, "pooling", local_reward.encode)
    assert np.abs(exact - expected).max() < 1e-4


def test_a_server_that_dies_is_an_error(servers: Any, story: Any) -> None:
    """The last test of this file."""
    settings = OpenAISamplerConfig(base_url=servers[0].url, client=ClientSettings(retries=1))
    config = SamplingConfig(n=8, max_new_tokens=180, on_long_prompt="skip")
    sampler = OpenAISampler(story[1], config, settings)
    prompts = sampler.encode(ROWS)
    with pytest.raises(BonbonError, match="did not give draw 1 to 8 of prompt"):
        sampler.sample(prompts * 20, lambda _: servers[0].kill())  # at the first reply
    sampler.close()
