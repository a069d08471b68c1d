"""What `bonbon serve` takes and answers, over a real socket, with a backend that is made up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.catalogue import STRATEGIES, strategy_class
from bonbon.serve.app import create_app, create_service
from bonbon.serve.backend import Answer, AnswerJob, BackendError
from bonbon.serve.config import ServeConfig, api_key
from bonbon.system.errors import BonbonError
from support.fake_backend import (
    CHAT,
    KEY,
    TEXT,
    TOKENS,
    FakeBackend,
    Running,
    assert_error,
    made_up_answer,
    serving,
)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[Running]:
    with serving(backend, sampling={"n": 4, "max_new_tokens": 32}, max_best_of=16) as running:
        yield running


# --- answers --------------------------------------------------------------------------------------


def test_a_chat(server: Running) -> None:
    reply = server.client().chat.completions.create(model="tiny", **CHAT)
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "tiny"
    (choice,) = reply.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content == "candidate 3 of Hi"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    # The tokens of all four candidates; the prompt's once.
    assert reply.usage.model_dump(
        include={"prompt_tokens", "completion_tokens", "total_tokens"}
    ) == {
        "prompt_tokens": 3,
        "completion_tokens": 4 * TOKENS,
        "total_tokens": 3 + 4 * TOKENS,
    }
    assert reply.model_extra["bonbon"] == {
        "strategy": {"name": "best_of_n"},
        "rewards": [3.0],
        "drawn": 4,
        "failed": 1,
        "cost": {"generated": 28, "prefilled": 3, "reward_calls": 4, "seconds": 0.5},
        "candidates": None,
    }
    assert reply._request_id is not None
    assert reply._request_id in reply.id


def test_candidates_on_demand(server: Running) -> None:
    reply = server.client().completions.create(
        model="tiny",
        prompt=["a", "b"],
        n=2,
        extra_body={"best_of": 3, "bonbon": {"return_candidates": True}},
    )
    found = reply.model_extra["bonbon"]["candidates"]
    assert [(c["prompt"], c["reward"], c["choice"]) for c in found] == [
        (0, 0.0, None), (0, 1.0, 1), (0, 2.0, 0), (1, 0.0, None), (1, 1.0, 3), (1, 2.0, 2),
    ]  # fmt: skip
    assert {c["tokens"] for c in found} == {TOKENS}
    by_choice = {c["choice"]: c["text"] for c in found}
    assert all(choice.text == by_choice[choice.index] for choice in reply.choices)


def test_several_prompts(server: Running) -> None:
    reply = server.client().completions.create(model="tiny", prompt=["a", "b", "c"], n=2)
    assert reply.object == "text_completion"
    assert [(choice.index, choice.text) for choice in reply.choices] == [
        (2 * i + k, f"candidate {3 - k} of {prompt}")
        for i, prompt in enumerate("abc")
        for k in (0, 1)
    ]
    assert reply.usage.prompt_tokens == 9
    assert reply.usage.completion_tokens == 3 * 4 * TOKENS
    assert reply.model_extra["bonbon"]["rewards"] == [3.0, 2.0] * 3


def test_log_probabilities(server: Running) -> None:
    chat = server.client().chat.completions.create(
        model="tiny", logprobs=True, top_logprobs=2, **CHAT
    )
    first, second = chat.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("é", -0.25, [195, 169])
    # JSON has no infinity; OpenAI writes −9999.
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [("b", -0.5), ("c", -9999.0)]
    assert (second.logprob, second.bytes, second.top_logprobs) == (-9999.0, None, [])
    text = server.client().completions.create(model="tiny", prompt="Once", logprobs=1)
    found = text.choices[0].logprobs
    assert found.tokens == ["é", "\ufffd"]
    assert found.token_logprobs == [-0.25, -9999.0]
    assert found.top_logprobs == [{"b": -0.5}, {}]
    assert found.text_offset == [0, 1]
    bare = server.client().completions.create(model="tiny", prompt="Once", logprobs=0)
    assert bare.choices[0].logprobs.top_logprobs is None


def test_models(server: Running) -> None:
    models = server.client().models
    assert [model.id for model in models.list()] == ["tiny", "org/other"]
    assert models.retrieve("org/other").id == "org/other"
    with pytest.raises(openai.NotFoundError) as caught:
        models.retrieve("org/none")
    assert caught.value.code == "model_not_found"
    assert server.post("/v1/completions", TEXT).json()["model"] == "tiny"


def test_text_that_utf_8_does_not_have(tmp_path: Path) -> None:
    def broken(job: AnswerJob) -> Answer:
        answer = made_up_answer(job)
        choice = replace(answer.choices[0], text="half \ud83d of one")
        return replace(answer, choices=(choice,))

    with serving(FakeBackend(broken)) as server:
        reply = server.post("/v1/completions", TEXT)
        assert reply.json()["choices"][0]["text"] == "half ? of one"


# --- jobs -----------------------------------------------------------------------------------------

DEFAULT = SamplingConfig(n=4, max_new_tokens=32)


def sampling(**changes: Any) -> SamplingConfig:
    return DEFAULT.model_copy(update=changes)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"sampling": DEFAULT, "choices": 1, "stop": (), "logprobs": None, "seeded": False}),
        ({"n": 6}, {"sampling": sampling(n=6), "choices": 6}),
        ({"n": 2, "best_of": 5}, {"sampling": sampling(n=5), "choices": 2}),
        ({"max_tokens": 5}, {"sampling": sampling(max_new_tokens=5)}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3},
         {"sampling": sampling(temperature=0.5, top_p=0.9, top_k=3)}),
        ({"temperature": 0, "best_of": 9, "n": 2, "top_p": 0.5, "top_k": 7},
         {"sampling": sampling(n=2, top_k=1), "choices": 2}),
        ({"temperature": 1e-6}, {"sampling": sampling(n=1, top_k=1)}),
        ({"n": 2.0, "seed": 1.0}, {"sampling": sampling(seed=1), "choices": 2}),
        ({"seed": -3}, {"sampling": sampling(seed=-3), "seeded": True}),
        ({"seed": 0}, {"sampling": DEFAULT, "seeded": True}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None, "seed": None, "n": None, "stream_options": None}, {"sampling": DEFAULT}),
        ({"strategy": "best_of_n"}, {"strategy": BestOfN()}),
        ({"strategy": {"name": "best_of_n"}}, {"strategy": BestOfN()}),
        ({"user": "me", "metadata": {"a": 1}, "store": True}, {"extra": {}}),
        ({"frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "suffix": None}, {"extra": {}}),
        ({"model": "org/other"}, {"model": "org/other"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_job(
    server: Running, backend: FakeBackend, path: str, asked: Any, expected: dict[str, Any]
) -> None:
    reply = server.post(path, (CHAT if "chat" in path else TEXT) | asked)
    assert reply.status_code == 200, reply.text
    job = backend.jobs[-1]
    assert {name: getattr(job, name) for name in expected} == expected
    assert len(reply.json()["choices"]) == (asked.get("n") or 1)


@pytest.mark.parametrize(
    ("path", "asked", "logprobs"),
    [
        ("/v1/chat/completions", {"logprobs": True}, 0),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 5}, 5),
        ("/v1/chat/completions", {"logprobs": False}, None),
        ("/v1/completions", {"logprobs": 0}, 0),
        ("/v1/completions", {"logprobs": 3}, 3),
        ("/v1/completions", {"logprobs": None}, None),
    ],
)
def test_asking_for_log_probabilities(
    server: Running, backend: FakeBackend, path: str, asked: Any, logprobs: int | None
) -> None:
    server.post(path, (CHAT if "chat" in path else TEXT) | asked)
    assert backend.jobs[-1].logprobs == logprobs


def test_messages(server: Running, backend: FakeBackend) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [
            {"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        # As a client sends an answer of this server back.
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]  # fmt: skip
    asked = {"messages": messages, "max_completion_tokens": 3}
    assert server.post("/v1/chat/completions", asked).status_code == 200
    assert backend.jobs[-1].sampling.max_new_tokens == 3
    assert backend.jobs[-1].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two", "name": "Ann"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]


def test_every_job_has_its_own_id_and_the_time_of_its_request(
    server: Running, backend: FakeBackend
) -> None:
    before = time.monotonic()
    server.post("/v1/completions", {"prompt": ["a", "b"]})
    server.post("/v1/completions", TEXT)
    jobs = backend.jobs[-3:]
    assert len({job.request_id for job in jobs}) == 3
    assert all(before + 119 < job.deadline < time.monotonic() + 121 for job in jobs)


def test_fields_that_the_backend_understands() -> None:
    backend = FakeBackend()
    names = ("response_format", "min_p", "user", "temperature", "logit_bias")
    with serving(backend, names) as server:
        asked = {"response_format": {"type": "json_object"}, "min_p": 0.1, "user": "me",
                 "temperature": 0.5, "logit_bias": None}  # fmt: skip
        assert server.post("/v1/chat/completions", CHAT | asked).status_code == 200
        (job,) = backend.jobs
        assert job.extra == {
            "response_format": {"type": "json_object"}, "min_p": 0.1, "user": "me"
        }  # fmt: skip
        assert job.sampling.temperature == 0.5  # ours are ours
        reply = server.post("/v1/chat/completions", CHAT | {"tools": [{}]})
        assert reply.json()["error"]["param"] == "tools"
        infinite = b'{"prompt": "a", "min_p": 1e999}'
        reply = server.post_bytes("/v1/completions", infinite, "application/json")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "min_p")


# --- wrong requests -------------------------------------------------------------------------------


WRONG_FOR_BOTH = [
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 2.5}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 17}, "best_of"),
    ({"n": 3, "best_of": 2}, None),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"strategy": "none_such"}, "strategy"),
    ({"strategy": {"name": "best_of_n", "alpha": 1}}, "strategy"),
    ({"strategy": {}}, "strategy"),
    ({"strategy": 5}, "strategy"),
    ({"bonbon": {"candidates": True}}, "bonbon.candidates"),
    ({"bonbon": True}, "bonbon"),
    ({"model": 5}, "model"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": False}, "frequency_penalty"),
    ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"none_such": None}, "none_such"),
    ({"top_n": 1}, "top_n"),
]
WRONG_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
     "messages[0].tool_calls"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, None),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"prompt": "Hi"}, "prompt"),
]  # fmt: skip
WRONG_TEXTS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": [[1, 2]]}, "prompt"),
    ({"prompt": ["a", None]}, "prompt[1]"),
    ({"prompt": ["a"] * 100}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("asked", "param"), WRONG_FOR_BOTH + WRONG_CHATS)
def test_wrong_chats(server: Running, asked: dict[str, Any], param: str | None) -> None:
    error = assert_error(server.post("/v1/chat/completions", CHAT | asked), 400, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("asked", "param"), WRONG_FOR_BOTH + WRONG_TEXTS)
def test_wrong_completions(server: Running, asked: dict[str, Any], param: str | None) -> None:
    assert_error(server.post("/v1/completions", TEXT | asked), 400, param)


def test_messages_that_help(server: Running) -> None:
    def said(asked: dict[str, Any]) -> str:
        message: str = server.post("/v1/completions", TEXT | asked).json()["error"]["message"]
        return message

    assert "token ids are not taken" in said({"prompt": [1, 2]})
    assert said({"none_such": 1}) == "unknown field 'none_such'"
    assert "valid string" in said({"stop": 5})
    assert "valid list" in said({"stop": 5})
    assert "unknown setting (of best_of_n" in said({"strategy": {"name": "best_of_n", "a": 1}})
    assert "tiny, org/other" in said({"model": "gpt"})
    assert "16" in said({"best_of": 17})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"text"',
        b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": "a"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\x01"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = server.post_bytes(path, body, "application/json")
        assert assert_error(reply, 400, reply.json()["error"]["param"])


@pytest.mark.parametrize(
    "media_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonl"]
)
def test_other_types_of_body(server: Running, media_type: str | None) -> None:
    reply = server.post_bytes("/v1/completions", b"{}", media_type)
    assert "application/json" in assert_error(reply, 415)["message"]
    reply = server.post_bytes("/v1/completions", b"{}", "Application/JSON; charset=utf-8")
    assert_error(reply, 400, "prompt")


def test_addresses_and_methods_that_there_are_not(server: Running) -> None:
    for path in ("/", "/v1", "/v1/chat", "/docs", "/v1/completions/", "/%00", "/../etc/passwd"):
        assert assert_error(server.get(path), 404)["code"] == "unknown_url"
    reply = server.get("/v1/chat/completions")
    assert assert_error(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert_error(server.http.request(method, "/v1/models"), 405)
    assert_error(server.get("/v1/models/"), 404, "model")
    assert_error(server.get("/v1/models/%FF%00"), 404, "model")


# --- large and slow bodies ------------------------------------------------------------------------


def test_large_bodies(server: Running) -> None:
    large = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'

    def in_parts() -> Iterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, in_parts()):
        reply = server.post_bytes("/v1/completions", content, "application/json")
        assert assert_error(reply, 413)["code"] == "body_too_large"
    exact = b'{"prompt": "' + b"a" * (2**20 - 14) + b'"}'
    reply = server.post_bytes("/v1/completions", exact, "application/json")
    assert reply.status_code == 200


async def asgi_post(
    parts: Callable[[], AsyncIterator[bytes]], headers: dict[str, str], **values: Any
) -> tuple[int, int]:
    """The status of a request in this process, and how many of its parts were taken."""
    app = create_app(create_service(ServeConfig(**values), FakeBackend()))
    taken, found = 0, 0
    source = parts()

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": await anext(source), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        nonlocal found
        found = message.get("status", found)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "headers": [(k.encode(), v.encode()) for k, v in {"host": "localhost", **headers}.items()],
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return found, taken


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"a" * 1000


async def never() -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


JSON_TYPE = {"content-type": "application/json"}


def test_a_large_body_is_not_read_to_its_end() -> None:
    found = asyncio.run(asgi_post(endless, JSON_TYPE, max_body_bytes=10_000))
    assert found == (413, 11)
    declared = JSON_TYPE | {"content-length": "10001"}
    assert asyncio.run(asgi_post(endless, declared, max_body_bytes=10_000)) == (413, 0)
    wrong_type = {"content-type": "text/plain"}
    assert asyncio.run(asgi_post(endless, wrong_type, max_body_bytes=10_000)) == (415, 0)


def test_a_body_that_does_not_come() -> None:
    assert asyncio.run(asgi_post(never, JSON_TYPE, deadline=0.05)) == (408, 1)


# --- errors of the backend, as the official client sees them --------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackendError("no", 400, "invalid_request_error", "c", "p"), openai.BadRequestError),
        (BackendError("no", 403, "invalid_request_error"), openai.PermissionDeniedError),
        (BackendError("no", 404, "invalid_request_error"), openai.NotFoundError),
        (BackendError("no", 429, "rate_limit_error", retry_after=2.2), openai.RateLimitError),
        (BackendError("no"), openai.InternalServerError),
        (BackendError("no", 504, "timeout_error", "timeout"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_backend(
    error: BackendError, expected: type[openai.APIStatusError], stream: bool
) -> None:
    def fail(job: AnswerJob) -> Answer:
        raise error

    with serving(FakeBackend(fail)) as server, pytest.raises(expected) as caught:
        server.client().chat.completions.create(model="tiny", stream=stream, **CHAT)
    assert caught.value.status_code == error.status
    assert caught.value.body == {
        "message": "no", "type": error.kind, "param": error.param, "code": error.code
    }  # fmt: skip
    after = caught.value.response.headers.get("retry-after")
    assert after == (None if error.retry_after is None else "3")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_exception(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(job: AnswerJob) -> Answer:
        raise RuntimeError("secret of the inside")

    with serving(FakeBackend(fail)) as server:
        reply = server.post("/v1/chat/completions", CHAT | {"stream": stream})
        error = assert_error(reply, 500)
        assert (
            server.metric('bonbon_requests_total{route="/v1/chat/completions",status="500"}') == 1
        )
    assert "secret" not in error["message"]
    assert error["type"] == "server_error"
    assert "secret of the inside" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text


def test_one_of_several_prompts_fails() -> None:
    def fail(job: AnswerJob) -> Answer:
        if job.prompt == "b":
            raise BackendError("not this one", 400)
        return made_up_answer(job)

    async def slow(job: AnswerJob) -> None:
        await asyncio.sleep(0 if job.prompt == "b" else 60)

    backend = FakeBackend(fail, slow)
    with serving(backend) as server:
        reply = server.post("/v1/completions", {"prompt": ["a", "b", "c"]})
        assert assert_error(reply, 400)["message"] == "not this one"
        assert {job.prompt for job in backend.cancelled} == {"a", "c"}


# --- the key --------------------------------------------------------------------------------------


def test_the_key(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("BONBON_API_KEY", KEY)
    wrong = [{}, {"Authorization": KEY}, {"Authorization": "Bearer"}, {"Authorization": b"\xff"},
             {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}]  # fmt: skip
    with serving(FakeBackend()) as server:
        assert server.client().chat.completions.create(model="tiny", **CHAT).choices
        assert server.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).is_success
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key="another").models.list()
        assert caught.value.code == "invalid_api_key"
        for headers in wrong:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/none"):
                assert_error(server.get(path, headers=headers), 401)
            assert_error(server.post("/v1/completions", TEXT, headers=headers), 401)
        assert server.get("/health").status_code == 200
        # Before the body is read.
        large = b"a" * 5_000_000
        assert_error(server.post_bytes("/v1/completions", large, None), 401)
        server.get(f"/v1/models?key={KEY}")
    assert "POST /v1/completions 401" in caplog.text
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("http")]
    assert not any(KEY in line for line in ours)


def test_without_a_key_only_this_machine_s_own_names_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BONBON_API_KEY", raising=False)
    with serving(FakeBackend()) as server:
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "127.0.0.2", "[::1]:80"):
            assert server.get("/v1/models", headers={"Host": host}).is_success
        for host in ("example.org", "example.org:8000", "localhost.example.org", "10.0.0.1", ""):
            for path in ("/v1/models", "/health", "/metrics"):
                error = assert_error(server.get(path, headers={"Host": host}), 403)
                assert error["code"] == "wrong_host"
    monkeypatch.setenv("BONBON_API_KEY", KEY)
    with serving(FakeBackend()) as server:
        headers = {"Host": "example.org", "Authorization": f"Bearer {KEY}"}
        assert server.get("/v1/models", headers=headers).is_success


def test_what_loads_code_is_the_server_s_to_choose() -> None:
    own = {"name": "self_consistency", "extractor": "bonbon.decoding.answers:boxed"}
    with serving(FakeBackend(), strategy=own) as server:
        refused = [
            {"name": "self_consistency", "extractor": "os:system"},
            {"name": "rbon_wd", "distance": "os:system"},
            {"name": "srbon_wd", "embedding": "some/model"},
            {"name": "tree_bon", "partial": {"implicit": "some/model"}},
            {"name": "reward_weighted_vote", "extractor": "bonbon.decoding.answers:gsm8k"},
        ]
        for strategy in refused:
            reply = server.post("/v1/completions", TEXT | {"strategy": strategy})
            error = assert_error(reply, 400, "strategy")
            assert "names code or a model to load" in error["message"]
        default = {"name": "rbon_wd", "distance": "embedding", "embedding": None}
        assert server.post("/v1/completions", TEXT | {"strategy": default}).is_success
        for strategy in (None, "self_consistency", own):
            reply = server.post("/v1/completions", TEXT | {"strategy": strategy})
            assert reply.json()["bonbon"]["strategy"] == own


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [0] * 400_000},
        {"messages": [{}] * 300_000},
        {"messages": [{"role": "user", "content": [0] * 400_000}]},
        {"messages": CHAT["messages"], **{f"field{i}": 0 for i in range(50_000)}},
        {**CHAT, "strategy": {"name": "best_of_n", **{f"s{i}": 0 for i in range(50_000)}}},
        {**CHAT, "strategy": {"name": "tree_bon", "layers": 10**400}},
        {**CHAT, "strategy": {"name": "tree_bon", "branch": 10**400}},
        {**CHAT, "strategy": {"name": "smc", "checkpoint_tokens": 10**400}},
    ],
)
def test_what_is_wrong_many_times_is_refused_once(server: Running, values: dict[str, Any]) -> None:
    reply = server.post("/v1/chat/completions", values)
    assert reply.status_code == 400
    assert len(reply.content) < 2_000


def test_more_prompts_than_can_wait(server: Running) -> None:
    reply = server.post("/v1/completions", {"prompt": [""] * 300_000})
    assert "prompts a request" in assert_error(reply, 400, "prompt")["message"]


def test_every_setting_that_loads_something_is_known_to_do_so() -> None:
    """A setting of a strategy is a number, or it is one that only the server may choose."""
    assert STRATEGIES
    for name in STRATEGIES:
        kind = strategy_class(name)
        numbers = {
            field
            for field, info in kind.model_fields.items()
            if info.annotation in (int, float, int | None)
        }
        assert kind.model_fields.keys() - numbers == kind.loads


def test_a_public_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BONBON_API_KEY", raising=False)
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert api_key(ServeConfig(host=host)) == ""
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "localhost.example.org"):
        with pytest.raises(BonbonError, match="BONBON_API_KEY"):
            api_key(ServeConfig(host=host))
    monkeypatch.setenv("BONBON_API_KEY", KEY)
    assert api_key(ServeConfig(host="0.0.0.0")) == KEY


def test_defaults_beyond_the_limits() -> None:
    with pytest.raises(ValidationError, match="max_best_of"):
        ServeConfig(sampling={"n": 9}, max_best_of=8)
    with pytest.raises(ValidationError, match="max_tokens"):
        ServeConfig(max_tokens=100)
