"""Scoring by a server over real sockets: a stub that answers as vLLM's three routes do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from bonbon.config.reward import RewardServerConfig
from bonbon.config.sampling import ClientSettings
from bonbon.remote import client as remote_client
from bonbon.rewards.openai import OpenAIReward
from bonbon.rewards.reward import score_groups
from bonbon.system.errors import BonbonError
from support.groups import group_of
from support.stub_upstream import FAULTS, StubUpstream, serving, some_faults

KEY = "sk-0123456789-secret"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
APIS = ("pooling", "classify", "score")


CLIENT = ClientSettings.model_fields.keys()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "_FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote_client, "_LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextmanager
def scoring(stub: StubUpstream, encode: Any = None, **settings: Any) -> Iterator[OpenAIReward]:
    """A reward behind a running stub."""
    client = {"timeout": 10.0} | {key: settings.pop(key) for key in CLIENT & settings.keys()}
    with serving(stub):
        config = RewardServerConfig(**{"base_url": stub.url, "client": client} | settings)
        reward = OpenAIReward(config, encode)
        try:
            yield reward
        finally:
            reward.close()


def scores(
    stub: StubUpstream, prompts: Sequence[Any], completions: Sequence[str], **changes: Any
) -> np.ndarray:
    with scoring(stub, **changes) as reward:
        return reward(prompts, completions)


def error_of(stub: StubUpstream, prompts: Sequence[Any] = ("Hi",), **changes: Any) -> str:
    with pytest.raises(BonbonError) as error:
        scores(stub, prompts, [f" number {i}" for i in range(len(prompts))], **changes)
    return str(error.value)


def number_in(asked: Any) -> float:
    """A reward that tells completions apart: the number that each ends with."""
    text = asked[-1]["content"] if isinstance(asked[-1], dict) else asked[-1]
    return float((asked if isinstance(asked, str) else text).split()[-1])


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("template", [True, False])
def test_each_completion_gets_its_own_reward(api: str, template: bool) -> None:
    """In order, the same ones again included."""
    stub = StubUpstream(
        score=lambda asked: 0.0 if "Hello" in str(asked[-1:]) else number_in(asked),
        template=template,
        delay=0.002,
    )
    numbers = [float(n) for n in np.random.default_rng(0).integers(-50, 50, 200)]
    found = scores(stub, ["Once"] * 200, [f" was {n}" for n in numbers], api=api)
    assert found.dtype == np.float64
    assert found.tolist() == numbers
    assert len(stub.bodies) == 200 + (api != "score")  # and the first, whether it is for chat
    assert set(stub.paths) <= {f"/{api}"}


@pytest.mark.parametrize("api", APIS)
def test_the_models_own_numbers_are_asked_for(api: str) -> None:
    stub = StubUpstream()
    scores(stub, ["Hi"], ["there"], api=api, model="rm")
    for body in stub.bodies:
        assert body["use_activation"] is False
        assert (body["truncate_prompt_tokens"], body["truncation_side"]) == (-1, "left")
        assert body["model"] == "rm"
    scores(stub, ["Hi"], ["there"], api=api)
    assert "model" not in stub.bodies[-1]


@pytest.mark.parametrize(
    ("prompt", "as_messages", "as_text"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}], "Hi"),
        (MESSAGES[1:], MESSAGES[1:], "Hello?"),
        (MESSAGES, MESSAGES, "system: Be kind.\nuser: Hello?"),
    ],
)
def test_what_the_model_reads(prompt: Any, as_messages: Any, as_text: str) -> None:
    """As the local reward model does: the conversation where it has a template, else a pair."""
    for api in ("pooling", "classify"):
        chat, plain = StubUpstream(), StubUpstream(template=False)
        scores(chat, [prompt], [" Yes."], api=api)
        assert chat.bodies[-1]["messages"] == [
            *as_messages, {"role": "assistant", "content": " Yes."}
        ]  # fmt: skip
        scores(plain, [prompt], [" Yes."], api=api)
        assert plain.bodies[-1]["input"] == as_text + " Yes."
        tokens = StubUpstream(score=len)
        assert scores(tokens, [prompt], [" Yes."], api=api, encode=lambda p, c: [1, 2, 3]) == [3.0]
        assert tokens.bodies[-1]["input"] == [1, 2, 3]
    pair = StubUpstream()
    scores(pair, [prompt], [" Yes."], api="score")
    assert (pair.bodies[-1]["text_1"], pair.bodies[-1]["text_2"]) == (as_text, " Yes.")


@pytest.mark.parametrize("ending", ["/v1", "/v1/", "", "/"])
def test_the_address_may_end_as_others_do(ending: str) -> None:
    stub = StubUpstream()
    with serving(stub):
        root = stub.url.removesuffix("/v1")
        reward = OpenAIReward(RewardServerConfig(base_url=root + ending, api="score"))
        reward(["Hi"], ["there"])
        reward.close()
    assert stub.paths == ["/score"]


def test_nothing_to_score() -> None:
    assert scores(StubUpstream(), [], []).shape == (0,)


def test_groups_are_scored() -> None:
    stub = StubUpstream(score=number_in, template=False)
    groups = [group_of(f"p{i}", completions=[f" {10 * i + k}" for k in range(4)]) for i in range(3)]
    with scoring(stub) as reward:
        found = score_groups(reward, groups)
    assert found == [tuple(float(10 * i + k) for k in range(4)) for i in range(3)]


# --- servers that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_hundreds_of_requests_while_a_third_fails(api: str) -> None:
    kinds = tuple(kind for kind in (*FAULTS, "garbage") if kind != "no choices")
    stub = StubUpstream(
        fault=some_faults(0.33, kinds), score=number_in, template=False, delay=0.002
    )
    numbers = [float(n) for n in range(300)]
    found = scores(
        stub, ["Once"] * 300, [f" was {n}" for n in numbers], api=api, timeout=1.0, concurrency=32
    )
    assert found.tolist() == numbers
    assert set(stub.faults) == {"", *kinds}
    assert stub.most_busy <= 32


def test_no_more_requests_at_a_time_than_set() -> None:
    stub = StubUpstream(delay=0.03)
    scores(stub, ["a"] * 12, ["b"] * 12, concurrency=3)
    assert stub.most_busy == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "it is nan"),
        (math.inf, "it is inf"),
        pytest.param(10**400, "it is inf", id="large"),
        (None, "None is not a number"),
        ("5", "'5' is not a number"),
        (True, "True is not a number"),
        ([[1.0], [2.0]], r"shape \(1, 2\)"),
        ([1.0, 2.0], r"shape \(1, 2\)"),
        ([], r"shape \(1, 0\)"),
    ],
)
def test_what_is_no_reward_is_none(value: Any, said: str) -> None:
    stub = StubUpstream(score=lambda _: value, template=False)
    for api in ("pooling", "classify"):
        message = error_of(stub, api=api)
        assert "the reward of completion 1 of 1 (' number 0')" in message
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(message)
    assert set(stub.asked.values()) == {2}  # once by each route: nothing would change


def test_a_number_in_a_vector_in_a_vector_is_one() -> None:
    stub = StubUpstream(score=lambda _: [2.5], template=False)
    assert scores(stub, ["Hi"], ["there"]).tolist() == [2.5]


@pytest.mark.parametrize(("count", "said"), [(0, "0 results"), (2, "2 results")])
def test_a_result_for_each_completion(count: int, said: str) -> None:
    stub = StubUpstream(reply=lambda found: found | {"data": found["data"] * count}, template=False)
    assert f"{said} for one completion" in error_of(stub)


@pytest.mark.parametrize("reply", [{}, {"data": None}, {"data": [{}]}, [], None, 7])
def test_a_reply_without_results(reply: Any) -> None:
    message = error_of(StubUpstream(reply=lambda _: reply, template=False), retries=1)
    assert "status 200 without a reply" in message


def test_the_completion_that_fails_is_named() -> None:
    stub = StubUpstream(
        fault=lambda request, _: "422" if "number 2" in request else "", template=False
    )
    message = error_of(stub, ["Hi"] * 4)
    assert "refuses the reward of completion 3 of 4 (' number 2'): status 422" in message


def test_a_server_without_the_route() -> None:
    assert "refuses the reward of a first conversation: status 404" in error_of(
        StubUpstream(fault=lambda *_: "404")
    )


def test_a_server_that_hangs_is_given_up() -> None:
    stub = StubUpstream(fault=lambda *_: "slow")
    message = error_of(stub, timeout=60.0, deadline=0.3, api="score")
    assert "reward.server.client.deadline = 0.3" in message


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub = StubUpstream(key=KEY)
    scores(stub, ["Hi"], ["there"])
    assert {headers["authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    repeating = StubUpstream(key=KEY, score=lambda _: KEY)
    assert KEY not in error_of(repeating)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-0123")
    message = error_of(StubUpstream(key=KEY))
    assert "which is set but not accepted" in message
    assert "sk-" not in message


def test_an_address_that_cannot_be_used() -> None:
    with pytest.raises(BonbonError, match=r"^reward\.server\.base_url "):
        OpenAIReward(RewardServerConfig(base_url="localhost:8000"))
