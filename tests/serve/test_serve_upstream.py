"""The backend in front of another server, asked over real sockets: a stub that fails as they do."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bonbon.rewards.reward  # noqa: F401 (loads torch now, and not within the first job's time)
from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.catalogue import STRATEGIES, parse_strategy
from bonbon.decoding.strategy import Floats, Source, Strategy, WholeDraws, one_hot
from bonbon.groups.group import Group
from bonbon.remote import client as remote_client
from bonbon.remote.client import FaultError
from bonbon.remote.completions_api import read_offer
from bonbon.sampling.cost import Cost
from bonbon.serve.backend import Answer, AnswerJob, BackendError, TokenLogprob
from bonbon.serve.upstream import backend as upstream
from bonbon.serve.upstream.backend import UpstreamBackend
from bonbon.serve.upstream.client import UpstreamClient, UpstreamConfig
from bonbon.serve.upstream.protocol import (
    candidate_seed,
    read_logprobs,
    read_reply,
    request_body,
    spent_on,
)
from bonbon.system.errors import BonbonError
from support.stub_upstream import FAULTS, StubUpstream, some_faults

KEY = "sk-0123456789-secret"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "_FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote_client, "_LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


class FirstDrawn(WholeDraws):
    """A strategy without a reward."""

    needs_reward: ClassVar[bool] = False

    def weights(self, group: Group, source: Source) -> Floats:
        return one_hot(0, group.n)


class MostLikely(WholeDraws):
    """A strategy that chooses by log-probability."""

    needs_reward: ClassVar[bool] = False
    needs_logprobs: ClassVar[bool] = True

    def weights(self, group: Group, source: Source) -> Floats:
        return one_hot(int(np.argmax(group.logprobs)), group.n)


class Branching(FirstDrawn):
    stepwise: ClassVar[bool] = True


class Broken(FirstDrawn):
    def weights(self, group: Group, source: Source) -> Floats:
        raise IndexError("secret detail")


class Twice(FirstDrawn):
    """Draws the candidates one by one, as a strategy does that decides when to stop."""

    def generate(self, prompts: Any, source: Source, reward: Any) -> Any:
        found = [source.draw(prompts, [range(k, k + 1)])[0] for k in range(source.config.n)]
        (generation,) = FirstDrawn().generate(prompts, Fixed(source, found[-1]), None)
        return [replace(generation, cost=sum((one.cost for one in found[1:]), found[0].cost))]


class Fixed:
    def __init__(self, source: Source, found: Any) -> None:
        self.config, self.found = source.config, found

    def draw(self, prompts: Any, ks: Any) -> Any:
        return [self.found]


def score(texts: Sequence[str]) -> np.ndarray:
    """Some reward of a text, without ties among the stub's."""
    return np.array([int(text.split()[0], 16) / 16**12 for text in texts])


def reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    return score(completions)


def job_of(
    prompt: Any = "Once upon a time", n: int = 4, seconds: float = 60.0, **changes: Any
) -> AnswerJob:
    sampling = changes.pop("sampling", {})
    values: dict[str, Any] = {
        "request_id": f"request-{time.monotonic_ns()}",
        "model": "stub",
        "prompt": prompt,
        "sampling": SamplingConfig(**({"n": n, "max_new_tokens": 9} | sampling)),
        "strategy": BestOfN(),
        "choices": 1,
        "deadline": time.monotonic() + seconds,
    }
    return AnswerJob(**(values | changes))


def run(test: Coroutine[Any, Any, T]) -> T:
    """A test's coroutine; one that hangs fails."""

    async def bounded() -> T:
        async with asyncio.timeout(120):
            return await test

    return asyncio.run(bounded())


def asking(
    stub: StubUpstream | None = None, scored_by: Any = reward, **changes: Any
) -> Callable[[Callable[[StubUpstream, UpstreamBackend], Coroutine[Any, Any, T]]], T]:
    """Run a coroutine function with a stub and a backend in front of it."""
    found = stub or StubUpstream()

    def call(test: Callable[[StubUpstream, UpstreamBackend], Coroutine[Any, Any, T]]) -> T:
        async def both() -> T:
            async with found:
                values = {"base_url": found.url, "timeout": 10.0} | changes
                backend = UpstreamBackend(UpstreamConfig(**values), scored_by)
                await backend.start()
                try:
                    return await test(found, backend)
                finally:
                    await backend.close()

        return run(both())

    return call


def answer_to(job: AnswerJob, stub: StubUpstream | None = None, **changes: Any) -> Answer:
    return asking(stub, **changes)(lambda _, backend: backend.answer(job))


def error_to(job: AnswerJob, stub: StubUpstream | None = None, **changes: Any) -> BackendError:
    with pytest.raises(BackendError) as error:
        answer_to(job, stub, **changes)
    return error.value


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Once upon a time", MESSAGES])
def test_the_candidate_of_the_largest_reward_is_returned(prompt: Any) -> None:
    stub = StubUpstream()
    answer = answer_to(job_of(prompt, n=5, choices=2), stub)
    texts, rewards = list(stub.tokens), score(list(stub.tokens))
    best = sorted(range(5), key=lambda i: -rewards[i])[:2]
    assert [choice.text for choice in answer.choices] == [texts[i] for i in best]
    assert [choice.reward for choice in answer.choices] == [rewards[i] for i in best]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    group = answer.generation.group
    assert sorted(group.completions) == sorted(texts)
    assert [group.completions[choice.index] for choice in answer.choices] == [
        texts[i] for i in best
    ]
    assert group.lengths() == tuple(stub.tokens[text] for text in group.completions)
    assert all(math.isnan(logprob) for logprob in group.logprobs)
    assert answer.cost.generated == sum(stub.tokens.values())
    assert answer.cost.reward_calls == 5
    assert answer.prompt_tokens == len(json.dumps(prompt))
    assert answer.cost.prefilled == 5 * answer.prompt_tokens
    assert answer.failed == 0
    assert set(stub.paths) == {
        "/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions"
    }


def test_what_a_request_holds() -> None:
    sampling = SamplingConfig(n=4, max_new_tokens=9, temperature=0.7, top_p=0.9)
    job = job_of(sampling=sampling.model_dump(), stop=("\n", "END"), extra={"user": "me", "n": 7})
    assert request_body(job, "m", {}, 2) == {
        "model": "m", "prompt": "Once upon a time", "n": 1, "stream": False, "max_tokens": 9,
        "temperature": 0.7, "top_p": 0.9, "stop": ["\n", "END"], "user": "me",
    }  # fmt: skip
    chat = job_of(MESSAGES, seeded=True, sampling={"top_k": 5, "seed": 3}, logprobs=0)
    assert request_body(chat, "m", {}, 0) == {
        "model": "m", "messages": MESSAGES, "n": 1, "stream": False, "max_tokens": 9,
        "temperature": 1.0, "top_p": 1.0, "top_k": 5, "seed": 3, "logprobs": True,
        "top_logprobs": 1,
    }  # fmt: skip
    greedy = request_body(job_of(sampling={"top_k": 1}, logprobs=3), "m", {}, 0)
    assert (greedy["temperature"], greedy["logprobs"]) == (0, 3)
    assert not {"top_k", "seed", "stop"} & greedy.keys()


@pytest.mark.parametrize(
    ("owner", "off"),
    [
        ("someone", {}),
        ("vllm", {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("sglang", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        ("bonbon", {"top_k": 0, "best_of": 1}),
    ],
)
def test_what_a_server_would_add_by_itself_is_turned_off(owner: str, off: dict[str, Any]) -> None:
    stub = StubUpstream(owned_by=owner)
    answer_to(job_of(n=1, extra={"min_p": 0.1} if off else {}), stub)
    expected = off | ({"min_p": 0.1} if off else {})
    (body,) = stub.bodies
    assert {name: body.get(name) for name in expected} == expected
    assert ("top_k" in body) == bool(off)
    answer_to(job_of(n=1, sampling={"top_k": 40}), stub)
    assert stub.bodies[-1]["top_k"] == 40


def test_a_seed_gives_the_same_answer_again() -> None:
    stub = StubUpstream()
    first, again, other = (
        answer_to(job_of(n=4, seeded=True, sampling={"seed": seed}), stub) for seed in (7, 7, 8)
    )
    assert again.generation.group == first.generation.group
    assert again.choices == first.choices
    assert not set(other.generation.group.completions) & set(first.generation.group.completions)
    unseeded = [answer_to(job_of(n=4), stub).generation.group.completions for _ in range(2)]
    assert not set(unseeded[0]) & set(unseeded[1])


@given(st.integers(), st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_candidates_have_seeds_of_their_own(seed: int, k: int, other: int) -> None:
    assert 0 <= candidate_seed(seed, k) < 2**31
    assert (candidate_seed(seed, k) == candidate_seed(seed, other)) == (k == other)
    if k:  # neighbouring jobs share none
        assert candidate_seed(seed, k) != candidate_seed(seed + k, 0)


def test_a_strategy_may_draw_several_times() -> None:
    stub = StubUpstream()
    answer = answer_to(job_of(n=3, strategy=Twice()), stub)
    assert len(stub.tokens) == 3
    assert answer.choices[0].text == list(stub.tokens)[-1]
    assert answer.cost.generated == sum(stub.tokens.values())


def test_what_was_cached_was_not_read() -> None:
    def cached(found: dict[str, Any]) -> dict[str, Any]:
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": 5}
        return found

    answer = answer_to(job_of(n=3), StubUpstream(reply=cached))
    assert answer.cost.prefilled == 3 * (answer.prompt_tokens - 5)


def test_more_cached_than_there_is_is_all_of_it() -> None:
    def cached(found: dict[str, Any]) -> dict[str, Any]:
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": 10**6}
        return found

    assert answer_to(job_of(n=3), StubUpstream(reply=cached)).cost.prefilled == 0


@pytest.mark.parametrize("name", ["completion_tokens", "prompt_tokens"])
@pytest.mark.parametrize("count", [10**9, -1, 2.5, "7", True, None])
def test_an_implausible_usage_is_a_fault_of_the_reply(name: str, count: Any) -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["usage"][name] = count
        return found

    stub = StubUpstream(reply=reply)
    error = error_to(job_of(n=2), stub)
    assert (error.status, len(stub.bodies)) == (502, 2)  # not tried again
    assert "how many tokens" in error.message
    assert spent_on(reply({"usage": {"completion_tokens": 3, "prompt_tokens": 4}})) == Cost()


def test_what_useless_replies_cost_counts() -> None:
    """Those that are tried again, and those that are not."""
    kinds = ["content_filter", "no choices", "abort", "", ""]  # then the further tries
    known: list[dict[str, int]] = []

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        known.append(found["usage"])
        kind = kinds[len(known) - 1] if len(known) <= len(kinds) else ""
        if kind == "no choices":
            found["choices"] = []
        elif kind:
            found["choices"][0]["finish_reason"] = kind
        return found

    answer = answer_to(job_of(n=4), StubUpstream(reply=reply))
    assert (answer.failed, answer.generation.group.n, len(known)) == (1, 3, 6)
    assert answer.cost.generated == sum(usage["completion_tokens"] for usage in known)
    assert answer.cost.prefilled == sum(usage["prompt_tokens"] for usage in known)
    assert answer.cost.generated > sum(answer.generation.group.lengths())


def test_replies_without_their_log_probabilities_cost_too() -> None:
    known: list[int] = []

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        known.append(found["usage"]["completion_tokens"])
        if len(known) == 2:
            found["choices"][0]["logprobs"] = None
        return found

    answer = answer_to(job_of(n=3, logprobs=1), StubUpstream(reply=reply))
    assert (answer.failed, len(known)) == (1, 3)
    assert answer.cost.generated == sum(known)


# --- servers that fail ----------------------------------------------------------------------------


def test_two_hundred_jobs_while_a_fifth_of_the_requests_fails() -> None:
    stub = StubUpstream(fault=some_faults(0.2), delay=0.002)

    async def all_jobs(stub: StubUpstream, backend: UpstreamBackend) -> list[Any]:
        jobs = [job_of(f"prompt {i}", n=2, seeded=i % 2 == 0) for i in range(200)]
        return await asyncio.gather(*map(backend.answer, jobs), return_exceptions=True)

    outcomes = asking(stub, timeout=2, concurrency=32, retries=3)(all_jobs)
    assert set(stub.faults) == {"", *FAULTS}  # each kind occurred
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    errors = [outcome for outcome in outcomes if not isinstance(outcome, Answer)]
    assert all(isinstance(error, BackendError) and error.status in (502, 504) for error in errors)
    assert len(answers) > 150  # all, unless this machine is too slow for the timeout
    for answer in answers:
        group = answer.generation.group
        assert group.n + answer.failed == 2
        assert answer.cost.generated >= sum(stub.tokens[text] for text in group.completions)
        assert answer.choices[0].reward == score(group.completions).max()
    assert sum(answer.cost.generated for answer in answers) <= sum(stub.tokens.values()) + stub.lost
    arrived = sum(answer.generation.group.n for answer in answers)
    assert len(stub.tokens) >= arrived > 0.75 * 400


def test_no_more_candidates_at_a_time_than_set() -> None:
    stub = StubUpstream(delay=0.05)
    answer_to(job_of(n=10), stub, concurrency=3)
    assert stub.most_busy == 3


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_is_tried_again(kind: str) -> None:
    stub = StubUpstream(fault=lambda _, attempt: kind if attempt == 0 else "")
    answer = answer_to(job_of(n=2, seeded=True), stub, timeout=1 if kind == "slow" else 10)
    assert (answer.failed, answer.generation.group.n) == (0, 2)
    assert stub.faults == {kind: 2, "": 2}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_stays_is_an_error_of_the_upstream(kind: str) -> None:
    stub = StubUpstream(fault=lambda *_: kind)
    error = error_to(job_of(n=2), stub, timeout=0.5 if kind == "slow" else 10, retries=2)
    assert error.status == (504 if kind == "slow" else 502)
    assert stub.faults == {kind: 2 * 3}
    assert "none of the 2 candidates" in error.message


def test_candidates_that_fail_do_not_sink_the_others() -> None:
    lost = candidate_seed(0, 1)
    stub = StubUpstream(fault=lambda request, _: "500" if f'"seed": {lost}' in request else "")
    answer = answer_to(job_of(n=4, seeded=True), stub, retries=1)
    assert (answer.failed, answer.generation.group.n) == (1, 3)
    assert answer.choices[0].reward == score(list(stub.tokens)).max()
    assert answer.cost.generated == sum(stub.tokens.values())


def test_candidates_that_do_not_come_in_time_are_dropped() -> None:
    lost = candidate_seed(0, 1)
    stub = StubUpstream(fault=lambda request, _: "slow" if f'"seed": {lost}' in request else "")
    job = job_of(n=3, seeded=True, seconds=3.0)
    answer = answer_to(job, stub, timeout=60, scoring_share=0.5)
    assert time.monotonic() < job.deadline  # so the share of the reward was kept
    assert (answer.failed, answer.generation.group.n) == (1, 2)


def test_a_job_without_a_candidate_in_time_is_a_timeout() -> None:
    stub = StubUpstream(fault=lambda *_: "slow")
    error = error_to(job_of(seconds=0.3), stub, timeout=60)
    assert (error.status, error.kind) == (504, "timeout_error")
    assert error_to(job_of(seconds=-1.0)).status == 504


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    stub = StubUpstream(fault=lambda *_: "429", retry_after="3000")
    error = error_to(job_of(n=2, seconds=1000), stub)  # would hang
    assert (error.status, error.retry_after) == (502, 3000)
    assert stub.faults == {"429": 2}


def test_a_pause_that_the_server_asks_for_is_kept() -> None:
    times: list[float] = []

    def fault(_request: str, attempt: int) -> str:
        times.append(time.monotonic())
        return "429" if attempt == 0 else ""

    answer_to(job_of(n=1), StubUpstream(fault=fault, retry_after="1"))
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize(("status", "shown"), [(400, 400), (404, 404), (413, 400), (422, 400)])
def test_a_refusal_is_the_clients_error_and_not_tried_again(status: int, shown: int) -> None:
    stub = StubUpstream(fault=lambda *_: str(status))
    error = error_to(job_of(n=3), stub)
    assert (error.status, error.message) == (shown, f"no, status {status}")
    assert (error.kind, error.code, error.param) == ("invalid_request_error", "c", "p")
    assert stub.faults[str(status)] <= 3


@pytest.mark.parametrize("status", [302, 405, 451])
def test_other_refusals_are_the_upstreams(status: int) -> None:
    error = error_to(job_of(n=1), StubUpstream(fault=lambda *_: str(status)))
    assert error.status == 502
    assert f"status {status}" in error.message


@pytest.mark.parametrize("status", ["400", "404", "405"])
def test_a_refusal_of_one_candidate_does_not_sink_the_others(status: str) -> None:
    first = f'"seed": {candidate_seed(0, 0)},'
    stub = StubUpstream(fault=lambda request, _: status if first in request else "", delay=0.05)
    answer = answer_to(job_of(n=4, seeded=True), stub)  # it comes before the replies
    assert (answer.failed, answer.generation.group.n) == (1, 3)
    assert stub.faults == {status: 1, "": 3}


def test_a_refusal_tells_more_than_other_faults() -> None:
    first = f'"seed": {candidate_seed(0, 0)},'
    stub = StubUpstream(fault=lambda request, _: "400" if first in request else "500")
    error = error_to(job_of(n=3, seeded=True), stub, retries=1)
    assert (error.status, error.message) == (400, "no, status 400")
    assert stub.faults == {"400": 1, "500": 4}


def test_a_refusal_after_the_first_draw_loses_nothing() -> None:
    asked = iter(range(1000))
    stub = StubUpstream(fault=lambda *_: "" if next(asked) < 3 else "404")
    strategy = parse_strategy({"name": "adaptive_n", "price": 1e-9, "min_n": 3, "batch": 2})
    answer = answer_to(job_of(n=7, strategy=strategy), stub)
    assert (answer.generation.group.n, answer.failed) == (3, 4)


def test_cookies_are_not_kept() -> None:
    stub = StubUpstream()
    stub.cookie = "session=someone; Path=/"

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        for _ in range(2):
            await backend.answer(job_of(n=2))

    asking(stub)(test)
    assert len(stub.headers) == 5
    assert not any("cookie" in headers for headers in stub.headers)


# --- keys and addresses ---------------------------------------------------------------------------


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub = StubUpstream(key=KEY)
    answer_to(job_of(), stub)
    assert {headers["authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-0123")
    for model in (None, "stub"):
        error = error_to(job_of(), StubUpstream(key=KEY), model=model)
        assert error.status == 502
        assert "OPENAI_API_KEY, which is set but not accepted" in error.message
        assert "sk-" not in error.message
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "which is not set" in error_to(job_of(), StubUpstream(key=KEY)).message


def test_an_upstream_that_repeats_the_key_does_not_give_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = run(_client())
    response = remote_client.httpx.Response(400, json={"error": {"message": f"bad {KEY}"}})
    error = client._refusal(400, response)
    assert error.message == "bad [key]"


async def _client() -> UpstreamClient:
    return UpstreamClient(UpstreamConfig())


@pytest.mark.parametrize("url", ["localhost:8000", "http://u:p@host/v1", "http://h/v1?key=1", ""])
def test_an_address_that_cannot_be_used(url: str) -> None:
    backend = UpstreamBackend(UpstreamConfig(base_url=url), reward)
    with pytest.raises(BonbonError, match=r"^upstream\.base_url "):
        run(backend.start())


def test_a_key_does_not_go_unencrypted_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    backend = UpstreamBackend(UpstreamConfig(base_url="http://10.0.0.1/v1"), reward)
    with pytest.raises(BonbonError, match=r"unencrypted to .*upstream\.api_key_env"):
        run(backend.start())


# --- models and health ----------------------------------------------------------------------------


def test_models_are_asked_for_once_by_all_who_ask_together() -> None:
    stub = StubUpstream(models=("a", "b"))

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        found = await asyncio.gather(*(backend.models() for _ in range(20)))
        assert found == [("a", "b")] * 20
        assert stub.models_asked == 1
        await backend.answer(job_of(n=1, model=""))
        assert stub.bodies[-1]["model"] == "a"
        await backend.answer(job_of(n=1, model="b"))
        assert stub.bodies[-1]["model"] == "b"
        assert stub.models_asked == 1

    asking(stub)(test)


def test_a_model_that_is_set_is_the_only_one() -> None:
    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        assert await backend.models() == ("b",)
        await backend.answer(job_of(n=1, model="anything"))
        assert stub.bodies[-1]["model"] == "b"

    asking(StubUpstream(models=("a", "b")), model="b")(test)


def test_an_upstream_may_start_later_and_come_back() -> None:
    stub = StubUpstream()

    async def test() -> None:
        await stub.start()
        await stub.stop()  # its port is known now
        config = UpstreamConfig(base_url=stub.url, retries=1)
        backend = UpstreamBackend(config, reward)
        await backend.start()
        assert not await backend.healthy()
        with pytest.raises(BackendError, match="does not name its models") as error:
            await backend.answer(job_of())
        assert error.value.status == 502
        for _ in range(2):
            await stub.start()
            while not await backend.healthy():
                await asyncio.sleep(0.01)
            await backend.answer(job_of())
            await stub.stop()
            with pytest.raises(BackendError, match="none of the 4 candidates") as error:
                await backend.answer(job_of())
            assert error.value.status == 502
        await backend.close()

    run(test())


def test_an_upstream_without_a_list_of_models_needs_a_name() -> None:
    async def test() -> None:
        async with StubUpstream() as stub:
            for model in ("stub", None):
                url = stub.url.removesuffix("/v1") + "/other"
                backend = UpstreamBackend(UpstreamConfig(base_url=url, model=model), reward)
                await backend.start()
                assert await backend.healthy() == (model is not None)
                with pytest.raises(BackendError, match="Not Found"):
                    await backend.answer(job_of())
                await backend.close()

    run(test())


@pytest.mark.parametrize("fault", ["500", "302", "401", "404", "slow"])
def test_jobs_go_on_while_models_are_not_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_OFFER_AGE", 0.0)
    monkeypatch.setattr(upstream, "_HEALTH_AGE", 0.0)
    monkeypatch.setattr(upstream, "_PATIENCE", 0.2)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        await backend.answer(job_of(n=1))
        asked = stub.models_asked
        stub.models_fault = fault
        assert await backend.models() == ("stub",)
        await backend.answer(job_of(n=1))
        assert stub.models_asked > asked
        assert stub.bodies[-1]["min_p"] == 0  # what is known of the server still holds
        assert not await backend.healthy()

    asking(StubUpstream(owned_by="vllm"))(test)


@pytest.mark.parametrize("fault", ["500", "302", "401", "405", "slow"])
def test_a_model_that_is_set_needs_no_list(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_PATIENCE", 0.2)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        stub.models_fault = fault
        await backend.answer(job_of(n=1))
        assert not await backend.healthy()
        stub.models_fault = ""
        if fault != "slow":  # what the server is gets known as soon as it says so
            await backend.answer(job_of(n=1))
            assert stub.bodies[-1]["min_p"] == 0

    asking(StubUpstream(owned_by="vllm"), model="stub")(test)


def test_models_that_do_not_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "_GET_SECONDS", 0.2)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        stub.models_fault = "slow"
        with pytest.raises(BackendError, match="does not name its models") as error:
            await backend.models()
        assert error.value.status == 502

    asking(timeout=1000)(test)  # would hang


# --- stopping -------------------------------------------------------------------------------------


def test_cancelling_a_job_ends_its_requests_and_its_thread() -> None:
    stub = StubUpstream(fault=lambda request, _: "slow" if "endless" in request else "")

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        jobs = [job_of("endless", seconds=1000) for _ in range(3)]
        tasks = [asyncio.create_task(backend.answer(job)) for job in jobs]
        while stub.busy < 2:  # the others wait for their turn, or for a thread
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 3
        while stub.busy:
            await asyncio.sleep(0.005)
        assert stub.abandoned == 2
        assert (await backend.answer(job_of("short"))).failed == 0
        assert set(stub.paths) == {"/v1/completions"}
        assert sum("endless" in json.dumps(body) for body in stub.bodies) == 2
        await _threads_have_ended()

    asking(stub, timeout=1000, concurrency=2)(test)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bonbon-strategy"]


async def _threads_have_ended() -> None:
    while _threads():
        await asyncio.sleep(0.005)


def test_a_reward_that_hangs_holds_up_neither_other_jobs_nor_the_end() -> None:
    go_on = threading.Event()

    def hanging_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        go_on.wait()
        return score(completions)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        for _ in range(2):
            with pytest.raises(BackendError) as error:
                await backend.answer(job_of(n=1, seconds=0.3))
            assert error.value.status == 504
        await backend.answer(job_of(n=1, strategy=FirstDrawn()))
        threads = _threads()
        assert threads
        assert all(thread.daemon for thread in threads)  # so the process may end
        go_on.set()
        await _threads_have_ended()

    try:
        asking(scored_by=hanging_reward, concurrency=1)(test)
    finally:
        go_on.set()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reward_that_ends_after_the_loop_disturbs_nobody() -> None:
    go_on = threading.Event()

    def late_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        go_on.wait()
        return score(completions)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        with pytest.raises(BackendError):
            await backend.answer(job_of(n=1, seconds=0.3))

    try:
        asking(scored_by=late_reward)(test)
    finally:
        threads = _threads()
        go_on.set()
    for thread in threads:
        thread.join(10)
    assert threads
    assert not _threads()


def test_a_passed_deadline_ends_the_requests() -> None:
    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        with pytest.raises(BackendError):
            await backend.answer(job_of(seconds=0.2))
        while stub.busy:
            await asyncio.sleep(0.005)
        assert stub.abandoned == 4
        await _threads_have_ended()

    asking(StubUpstream(fault=lambda *_: "slow"), timeout=60, concurrency=4)(test)


def test_closing_ends_the_jobs() -> None:
    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        task = asyncio.create_task(backend.answer(job_of()))
        while stub.busy < 4:
            await asyncio.sleep(0.005)
        await backend.close()
        with pytest.raises(BackendError, match="stopping") as error:
            await task
        assert error.value.status == 503

    asking(StubUpstream(fault=lambda *_: "slow"), timeout=60)(test)


# --- rewards and strategies -----------------------------------------------------------------------


def test_a_reward_is_called_once_at_a_time() -> None:
    running = 0
    most = 0

    def slow_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.005)
        running -= 1
        return score(completions)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        await asyncio.gather(*(backend.answer(job_of(n=2)) for _ in range(20)))

    asking(scored_by=slow_reward)(test)
    assert most == 1


def test_a_reward_is_not_called_for_nobody() -> None:
    calls: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def waiting_reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        calls.append(len(completions))
        started.set()
        go_on.wait(10)
        return score(completions)

    async def test(stub: StubUpstream, backend: UpstreamBackend) -> None:
        first = asyncio.create_task(backend.answer(job_of(n=1)))
        await asyncio.to_thread(started.wait, 10)
        second = asyncio.create_task(backend.answer(job_of(n=2)))
        while len(stub.tokens) < 3:
            await asyncio.sleep(0.005)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert (await first).cost.reward_calls == 1
        await _threads_have_ended()
        assert calls == [1]

    asking(scored_by=waiting_reward, concurrency=4)(test)


def raising(error: Exception) -> Any:
    def failing(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        raise error

    return failing


@pytest.mark.parametrize(
    ("scored_by", "message"),
    [
        (raising(KeyError("x")), "the reward failed: KeyError"),
        (raising(BonbonError("secret detail")), "the reward failed: BonbonError"),
        (lambda p, c: np.full(len(c), math.nan), "NaN or an infinity"),
        (lambda p, c: np.full(len(c), math.inf), "NaN or an infinity"),
        (lambda p, c: 1.0, r"shape \(\) for 4 completions"),
    ],
)
def test_a_reward_that_fails_is_the_servers_fault(scored_by: Any, message: str) -> None:
    error = error_to(job_of(), scored_by=scored_by)
    assert error.status == 500
    with pytest.raises(BackendError, match=message):
        raise error


@pytest.mark.parametrize(
    ("strategy", "scored_by", "status", "message"),
    [
        (Branching(), reward, 400, "Branching drops or branches"),
        (BestOfN(), None, 400, "best_of_n needs a reward and this server has none"),
        (Broken(), reward, 500, "the strategy failed: IndexError"),
        (BestOfN(), lambda *_: sys.exit(1), 500, "the strategy failed: SystemExit"),
    ],
)
def test_what_cannot_be_done(strategy: Strategy, scored_by: Any, status: int, message: str) -> None:
    error = error_to(job_of(strategy=strategy), scored_by=scored_by)
    assert error.status == status
    assert message in error.message
    assert "secret detail" not in error.message


def gaps(texts: Sequence[str]) -> np.ndarray:
    """Some distance between texts, as a strategy's `distance` function."""
    lengths = np.array([len(text) for text in texts], dtype=float)
    return np.abs(lengths[:, None] - lengths)


SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive_n": {"price": 1e-6},
    "rbon_wd": {"distance": "test_serve_upstream:gaps"},
    "srbon_wd": {"distance": "test_serve_upstream:gaps"},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_whole_draws_answers(name: str) -> None:
    strategy = parse_strategy({"name": name} | SETTINGS.get(name, {}))
    stub = StubUpstream()
    job = job_of(n=6, choices=2, strategy=strategy, seeded=True)
    if strategy.stepwise:
        assert error_to(job, stub).status == 400
        return
    answer = answer_to(job, stub)
    assert answer.choices[0].text == answer.generation.completion
    assert answer.cost.generated == sum(stub.tokens.values())
    asked_for_logprobs = any("logprobs" in body for body in stub.bodies)
    assert asked_for_logprobs == strategy.needs_logprobs
    assert answer_to(job, stub).choices == answer.choices


def test_a_later_round_that_brings_nothing_does_not_lose_the_first() -> None:
    asked = iter(range(1000))
    stub = StubUpstream(fault=lambda *_: "" if next(asked) < 3 else "500")
    strategy = parse_strategy({"name": "adaptive_n", "price": 1e-9, "min_n": 3, "batch": 2})
    answer = answer_to(job_of(n=7, strategy=strategy, seeded=True), stub)
    assert answer.generation.group.n == 3
    assert answer.failed == 4
    assert answer.cost.reward_calls == 3
    assert answer.prompt_tokens > 0


@pytest.mark.parametrize("name", ["rbon_wd", "srbon_wd"])
def test_embeddings_take_a_setting(name: str) -> None:
    stub = StubUpstream()
    error = error_to(job_of(strategy=parse_strategy(name)), stub)
    assert error.status == 400
    assert not stub.bodies  # nothing was drawn, and nothing paid
    assert "`distance` or `embedding`" in error.message


def test_a_strategy_without_a_reward_does_not_pay_for_one() -> None:
    answer = answer_to(job_of(strategy=FirstDrawn(), choices=2), scored_by=raising(OSError()))
    assert answer.cost.reward_calls == 0
    assert [choice.reward for choice in answer.choices] == [None, None]


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Once upon a time", MESSAGES])
@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_are_those_of_the_upstream(prompt: Any, top: int) -> None:
    answer = answer_to(job_of(prompt, n=3, choices=3, logprobs=top))
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(token.token for token in choice.logprobs) == choice.text
        expected = [-0.25 * (i + 1) for i in range(len(choice.logprobs))]
        assert [token.logprob for token in choice.logprobs] == expected
        assert answer.generation.group.logprobs[choice.index] == sum(expected)
        assert {len(token.top) for token in choice.logprobs} == {top}
    plain = answer_to(job_of(prompt))
    assert plain.choices[0].logprobs is None


def test_a_strategy_that_needs_log_probabilities_gets_them() -> None:
    stub = StubUpstream()
    answer = answer_to(job_of(n=6, strategy=MostLikely()), stub)
    assert stub.tokens[answer.choices[0].text] == min(stub.tokens.values())
    assert answer.choices[0].logprobs is None  # nobody asked for them


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 3}])
def test_log_probabilities_of_another_distribution_choose_nothing(sampling: Any) -> None:
    job = job_of(strategy=MostLikely(), sampling=sampling)
    error = error_to(job)
    assert error.status == 400
    assert "upstream.processed_logprobs" in error.message
    assert answer_to(job_of(strategy=MostLikely(), sampling=sampling), processed_logprobs=True)
    assert answer_to(job_of(logprobs=1, sampling=sampling)).choices[0].logprobs


@pytest.mark.parametrize(
    "extra",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logit_bias": {"5": -100}},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
    ],
)
def test_fields_that_change_the_distribution_choose_nothing(extra: dict[str, Any]) -> None:
    stub = StubUpstream()
    error = error_to(job_of(strategy=MostLikely(), extra=extra), stub)
    assert error.status == 400
    assert f"leave out {next(iter(extra))}, or" in error.message
    assert not stub.bodies
    assert answer_to(job_of(strategy=MostLikely(), extra=extra), processed_logprobs=True)
    assert answer_to(job_of(extra=extra))  # which chooses by its reward alone


def test_fields_that_change_nothing_are_taken() -> None:
    extra = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert answer_to(job_of(strategy=MostLikely(), extra=extra))


def test_the_most_likely_completion_leaves_nothing_to_choose() -> None:
    for extra in ({}, {"frequency_penalty": 1}):
        job = job_of(n=1, strategy=MostLikely(), sampling={"top_k": 1}, extra=extra)
        assert answer_to(job).choices


def without(*path: str) -> Callable[[Any], Any]:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        where: Any = found
        for name in path[:-1]:
            where = where[0] if name == "0" else where[name]
        where[path[-1]] = None
        return found

    return reply


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (without("choices", "0", "logprobs"), "no log-probabilities"),
        (without("usage"), "how many tokens"),
        (without("usage", "completion_tokens"), "how many tokens"),
        (without("choices", "0", "finish_reason"), "finish_reason None"),
    ],
)
def test_replies_that_are_no_use(reply: Callable[[Any], Any], message: str) -> None:
    error = error_to(job_of(strategy=MostLikely()), StubUpstream(reply=reply), retries=1)
    assert error.status == 502
    assert message in error.message


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls"])
def test_candidates_that_were_filtered_are_dropped_and_not_drawn_again(reason: str) -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        if int(found["choices"][0]["text"].split()[0], 16) % 2:
            found["choices"][0]["finish_reason"] = reason
        return found

    stub = StubUpstream(reply=reply)
    answer = answer_to(job_of(n=8, seeded=True), stub)
    assert len(stub.bodies) == 8
    assert answer.generation.group.n + answer.failed == 8
    assert 0 < answer.failed < 8


def test_thoughts_are_neither_scored_nor_returned() -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
        found["choices"][0] |= {"message": message, "finish_reason": "length"}
        return found

    seen: list[str] = []

    def noting(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
        seen.extend(completions)
        return np.zeros(len(completions))

    stub = StubUpstream(reply=reply)
    answer = answer_to(job_of(MESSAGES, n=2), stub, scored_by=noting)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    assert seen == ["", ""]
    assert answer.cost.generated == sum(stub.tokens.values())  # they cost all the same


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_log_probabilities_that_are_none(value: float) -> None:
    """One bad value makes one reply useless."""
    replies = iter(range(1000))

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        if next(replies) == 1:
            found["choices"][0]["logprobs"]["token_logprobs"][1] = value
        return found

    answer = answer_to(job_of(n=3, choices=2, logprobs=1), StubUpstream(reply=reply))
    assert (answer.failed, answer.generation.group.n) == (1, 2)
    assert all(math.isfinite(logprob) for logprob in answer.generation.group.logprobs)


def test_alternatives_that_cannot_be_are_left_out() -> None:
    found = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}
    expected = read_logprobs(found, 3)
    found["top_logprobs"] = [{"b": -math.inf, "a": -1.0, "c": -math.inf}]
    assert read_logprobs(found, 3) == expected
    for value in (math.nan, math.inf):
        found["top_logprobs"] = [{"b": value, "a": -1.0}]
        with pytest.raises(FaultError):
            read_logprobs(found, 1)


@pytest.mark.parametrize("prompt", ["Once upon a time", MESSAGES])
def test_a_lone_surrogate_is_replaced(prompt: Any) -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        choice = found["choices"][0]
        if "message" in choice:
            choice["message"]["content"] += " \ud83d \U0001f600"
            choice["logprobs"]["content"][0]["token"] = "\ud83d"
        else:
            choice["text"] += " \ud83d \U0001f600"
            choice["logprobs"]["tokens"][0] = "\ud83d"
        return found

    (choice,) = answer_to(job_of(prompt, n=2, logprobs=1), StubUpstream(reply=reply)).choices
    assert choice.text.endswith(" ? \U0001f600")
    assert choice.logprobs is not None
    assert choice.logprobs[0].token == "?"


# --- reading replies ------------------------------------------------------------------------------

NUMBERS = st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False)
KEYS = st.sampled_from(
    ["choices", "message", "content", "text", "finish_reason", "usage", "completion_tokens",
     "prompt_tokens", "prompt_tokens_details", "logprobs", "tokens", "token_logprobs",
     "top_logprobs", "token", "logprob", "data", "id", "owned_by"]
)  # fmt: skip
JSON = st.recursive(
    NUMBERS | st.sampled_from(["", "stop", "text", "vllm", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@given(JSON, st.sampled_from([job_of(), job_of(MESSAGES), job_of(logprobs=2)]))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_no_reply_is_too_strange(found: Any, job: AnswerJob) -> None:
    expected = (ValueError, LookupError, TypeError, AttributeError)
    for read in (lambda: read_reply(found, job), lambda: read_offer(found)):
        try:
            read()
        except (FaultError, *expected):
            continue


def test_log_probabilities_in_every_form() -> None:
    chat = {
        "content": [
            {
                "token": "a",
                "logprob": -1.0,
                "top_logprobs": [
                    {"token": "c", "logprob": -3.0},
                    {"token": "b", "logprob": -0.5},
                    {"token": "a", "logprob": -1.0},
                ],
            }
        ]
    }
    legacy = {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"c": -3.0, "b": -0.5, "a": -1.0}],
    }
    expected = (TokenLogprob("a", -1.0, (("b", -0.5), ("a", -1.0))),)
    assert read_logprobs(chat, 2) == read_logprobs(legacy, 2) == expected
    assert read_logprobs({**legacy, "top_logprobs": None}, 2) == (TokenLogprob("a", -1.0),)
    assert read_logprobs({"content": []}, 0) == ()
    for nothing in (None, {}, {"content": None}, [], "x"):
        assert read_logprobs(nothing, 0) is None
    with pytest.raises(TypeError):
        read_logprobs({"tokens": ["a"], "token_logprobs": [None], "top_logprobs": None}, 0)
