"""`bonbon serve` at work: streams, queues, deadlines, clients that go, load, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonbon.serve.admission import Admission
from bonbon.serve.api.streaming import pieces
from bonbon.serve.backend import Answer, AnswerJob, BackendError
from bonbon.serve.config import ServeConfig
from bonbon.serve.run import listening, serve
from bonbon.system.errors import BonbonError
from support.fake_backend import (
    CHAT,
    TEXT,
    FakeBackend,
    Gate,
    Running,
    assert_error,
    made_up_answer,
    serving,
    until,
)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[Running]:
    with serving(backend, sampling={"n": 4, "max_new_tokens": 32}, max_best_of=16) as running:
        yield running


# --- streams --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.text(st.sampled_from("ab \n\t" + "é日\u3000")) | st.text(min_size=100))
def test_pieces_join_to_the_text(text: str) -> None:
    found = pieces(text)
    assert "".join(found) == text
    assert found
    assert all(len(piece.strip()) <= 40 for piece in found)


def test_a_streamed_chat(server: Running) -> None:
    client = server.client()
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", n=2, stream=True, stream_options=options, logprobs=True, **CHAT
        )
    )
    whole = client.chat.completions.create(model="tiny", n=2, logprobs=True, **CHAT)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *parts, last = chunks
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in parts)
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert len([part for part in mine if part.delta.content]) > 1
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [
            choice.finish_reason
        ]
        logprobs = [token for part in mine if part.logprobs for token in part.logprobs.content]
        assert logprobs == choice.logprobs.content
    # The choices take turns.
    assert [chunk.choices[0].index for chunk in parts][:4] == [0, 1, 0, 1]
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert last.model_extra["bonbon"] == whole.model_extra["bonbon"]


def test_a_streamed_completion(server: Running) -> None:
    client = server.client()
    chunks = list(client.completions.create(model="tiny", prompt=["a", "b"], stream=True))
    whole = client.completions.create(model="tiny", prompt=["a", "b"])
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].model_extra["bonbon"] == whole.model_extra["bonbon"]


def test_what_a_stream_looks_like(server: Running) -> None:
    reply = server.post("/v1/completions", TEXT | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    events = reply.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: {") for event in events[:-1])
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event[6:]) for event in events[:-1])


def test_an_empty_answer_is_streamed_too() -> None:
    def empty(job: AnswerJob) -> Answer:
        answer = made_up_answer(job)
        return replace(answer, choices=(replace(answer.choices[0], text=""),))

    with serving(FakeBackend(empty)) as server:
        chunks = list(
            server.client().chat.completions.create(
                model="tiny", stream=True, logprobs=True, **CHAT
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == 2


def test_a_stream_is_kept_alive() -> None:
    gate = Gate()
    with serving(FakeBackend(before=gate), keepalive=0.02) as server:
        body = TEXT | {"stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert reply.status_code == 200
            assert [next(lines) for _ in range(4)] == [": waiting", ""] * 2
            gate.open.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        # And the client passes over the comments.
        gate.open.clear()
        chunks = server.client().completions.create(model="tiny", prompt="a", stream=True)
        gate.open.set()
        assert "".join(chunk.choices[0].text for chunk in chunks) == "candidate 7 of a"


@pytest.mark.parametrize("error", [BackendError("too bad", 502), RuntimeError("inside")])
def test_an_error_in_a_stream_that_has_begun(error: Exception) -> None:
    gate = Gate()

    def fail(job: AnswerJob) -> Answer:
        raise error

    with serving(FakeBackend(fail, gate), keepalive=0.02) as server:
        chunks = server.client().completions.create(model="tiny", prompt="a", stream=True)
        gate.open.set()
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
        assert not isinstance(caught.value, openai.APIStatusError)
        message = "too bad" if isinstance(error, BackendError) else "the server failed unexpectedly"
        assert message in caught.value.message
        assert "inside" not in caught.value.message


# --- admission ------------------------------------------------------------------------------------


def post_in_threads(server: Running, bodies: list[Any]) -> list[httpx.Response | None]:
    """The replies to requests at the same time."""
    replies: list[httpx.Response | None] = [None] * len(bodies)

    def post(index: int) -> None:
        replies[index] = server.post("/v1/completions", bodies[index])

    threads = [threading.Thread(target=post, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return replies


@contextlib.contextmanager
def posted(server: Running, body: Any) -> Iterator[list[httpx.Response]]:
    """A request that waits in a thread; its reply is in the list at the end."""
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body)))
    thread.start()
    yield found
    thread.join(30)
    assert not thread.is_alive()


def test_a_full_queue() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, concurrency=2, queue=3) as server, contextlib.ExitStack() as stack:
        admission = server.server.service.admission
        found = []
        for number in range(5):
            found.append(stack.enter_context(posted(server, TEXT)))
            total = number + 1
            until(lambda total=total: admission.running + admission.waiting == total, "admitted")
        assert (admission.running, admission.waiting) == (2, 3)
        assert server.metric("bonbon_jobs_running") == 2
        assert server.metric("bonbon_queue_length") == 3
        for stream in (False, True):
            reply = server.post("/v1/completions", TEXT | {"stream": stream})
            error = assert_error(reply, 429)
            assert error["code"] == "rate_limit_exceeded"
            assert reply.headers["retry-after"] == "2"  # a second a job, as far as anybody knows
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="tiny", prompt="a")
        assert server.metric("bonbon_rejected_total") == 3
        gate.open.set()
        until(lambda: all(found), "answered")
        assert [replies[0].status_code for replies in found] == [200] * 5
        assert backend.most == 2
        assert server.metric("bonbon_jobs_running") == 0


def test_the_prompts_of_a_request_are_admitted_together() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, concurrency=2, queue=2) as server:
        with posted(server, {"prompt": ["a", "b", "c"]}) as found:
            until(lambda: len(backend.jobs) == 2, "running")
            assert_error(server.post("/v1/completions", {"prompt": ["d", "e"]}), 429)
            assert_error(server.post("/v1/completions", {"prompt": list("abcde")}), 400, "prompt")
            gate.open.set()
        assert len(found[0].json()["choices"]) == 3
        assert len(server.post("/v1/completions", {"prompt": list("abcd")}).json()["choices"]) == 4
        assert backend.most == 2


def test_jobs_take_their_turns_in_order() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, concurrency=1, queue=10) as server, contextlib.ExitStack() as stack:
        admission = server.server.service.admission
        for number in range(5):
            stack.enter_context(posted(server, {"prompt": str(number)}))
            total = number + 1
            until(lambda total=total: admission.running + admission.waiting == total, "admitted")
        gate.open.set()
        until(lambda: len(backend.answers) == 5, "answered")
        assert [job.prompt for job in backend.jobs] == list("01234")


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["end", "cancel"])), max_size=20),
    st.randoms(use_true_random=False),
)
def test_admission_never_exceeds_its_limits_and_forgets_nobody(
    concurrency: int, queue: int, requests: list[tuple[int, str]], chance: random.Random
) -> None:
    async def run() -> None:
        admission = Admission(concurrency, queue)
        inside: set[int] = set()
        ended: list[int] = []
        release = [asyncio.Event() for _ in requests]

        async def job(number: int, ticket: Any) -> None:
            await admission.turn(ticket)
            inside.add(number)
            try:
                await release[number // 10].wait()
                ended.append(number)
            finally:
                inside.discard(number)
                admission.leave(ticket)

        async def request(number: int, size: int) -> None:
            with admission.tickets(size) as tickets:
                await asyncio.gather(*(job(10 * number + i, t) for i, t in enumerate(tickets)))

        tasks = [
            asyncio.create_task(request(number, size)) for number, (size, _) in enumerate(requests)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert admission.running <= concurrency
        assert admission.waiting <= queue
        refused = {task for task in tasks if task.done()}
        order = list(range(len(tasks)))
        chance.shuffle(order)
        for number in order:
            if requests[number][1] == "cancel":
                tasks[number].cancel()
            release[number].set()
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(inside) <= admission.running <= concurrency
            assert admission.waiting == 0 or admission.running == concurrency
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert (admission.running, admission.waiting) == (0, 0)
        for number, task in enumerate(tasks):
            size, how = requests[number]
            mine = {job for job in ended if job // 10 == number}
            if task in refused:
                assert isinstance(task.exception(), BackendError)
            elif how == "end":
                assert len(mine) == size

    asyncio.run(run())


def test_retry_after_follows_the_jobs() -> None:
    async def run() -> None:
        admission = Admission(2, 10)
        assert admission.retry_after() == 1.0
        admission._recent.extend([30.0, 50.0])
        assert admission.retry_after() == 40.0 / 2
        with admission.tickets(5):
            assert (admission.running, admission.waiting) == (2, 3)
            assert admission.retry_after() == 40.0 * 4 / 2

    asyncio.run(run())


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline(stream: bool) -> None:
    backend = FakeBackend(before=Gate())
    with serving(backend, concurrency=1, deadline=0.3) as server:
        bodies = [{"prompt": str(k), "stream": stream} for k in range(3)]
        for reply in post_in_threads(server, bodies):
            assert reply is not None
            error = assert_error(reply, 504)
            assert (error["type"], error["code"]) == ("timeout_error", "timeout")
        until(lambda: backend.running == 0, "stopped")
        assert len(backend.cancelled) == len(backend.jobs)
        assert server.server.service.admission.waiting == 0


def test_a_timeout_of_the_backend_is_not_the_deadline() -> None:
    def fail(job: AnswerJob) -> Answer:
        raise TimeoutError("of something inside")

    with serving(FakeBackend(fail)) as server:
        assert_error(server.post("/v1/completions", TEXT), 500)


# --- clients that go ------------------------------------------------------------------------------


def send_and_keep(server: Running, body: dict[str, Any]) -> socket.socket:
    text = json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", server.port))
    found.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(text)).encode() + b"\r\n\r\n" + text
    )
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keepalive", [0.02, 60.0])
def test_a_client_that_goes_while_its_job_runs(stream: bool, keepalive: float) -> None:
    backend = FakeBackend(before=Gate())
    with serving(backend, concurrency=1, queue=0, keepalive=keepalive) as server:
        connection = send_and_keep(server, TEXT | {"stream": stream})
        until(lambda: backend.running == 1, "running")
        if stream and keepalive < 1:
            assert b"200 OK" in connection.recv(1000)
        connection.close()
        until(lambda: len(backend.cancelled) == 1, "cancelled")
        until(lambda: server.server.service.admission.running == 0, "slot given back")
        backend.before = None
        assert server.post("/v1/completions", TEXT).status_code == 200
        status = "200" if stream and keepalive < 1 else "499"
        name = f'bonbon_requests_total{{route="/v1/completions",status="{status}"}}'
        assert server.metric(name) >= 1


def test_a_client_that_goes_while_it_waits() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, concurrency=1, queue=1) as server:
        admission = server.server.service.admission
        with posted(server, TEXT) as found:
            until(lambda: backend.running == 1, "running")
            connection = send_and_keep(server, {"prompt": "never drawn"})
            until(lambda: admission.waiting == 1, "waiting")
            connection.close()
            until(lambda: admission.waiting == 0, "gone")
            gate.open.set()
        assert found[0].status_code == 200
        assert [job.prompt for job in backend.jobs] == ["Once"]


def test_a_client_that_goes_before_its_body_is_there() -> None:
    with serving(FakeBackend()) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.close()
        name = 'bonbon_requests_total{route="/v1/completions",status="499"}'
        until(lambda: name in server.get("/metrics").text, "counted")


# --- the whole under load -------------------------------------------------------------------------


def test_two_hundred_requests_at_once() -> None:
    chance = random.Random(0)
    fate = {str(k): (chance.random() < 0.2, chance.uniform(0, 0.05)) for k in range(200)}

    async def wait(job: AnswerJob) -> None:
        assert isinstance(job.prompt, str)
        await asyncio.sleep(fate[job.prompt][1])

    def reply(job: AnswerJob) -> Answer:
        if fate[str(job.prompt)][0]:
            raise BackendError("one of the unlucky fifth", 502, "upstream_error")
        return made_up_answer(job)

    async def ask(client: openai.AsyncOpenAI, k: int) -> int:
        body = {"best_of": 1 + k % 5}
        try:
            if k % 3:
                whole = await client.completions.create(
                    model="tiny", prompt=str(k), extra_body=body
                )
                assert whole.choices[0].text == f"candidate {k % 5} of {k}"
                return whole.usage.completion_tokens
            stream = await client.completions.create(
                model="tiny",
                prompt=str(k),
                stream=True,
                stream_options={"include_usage": True},
                extra_body=body,
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
            assert text == f"candidate {k % 5} of {k}"
            return chunks[-1].usage.completion_tokens
        except openai.APIError as error:
            return -1 if "unlucky" in error.message else -2

    async def ask_all(address: str) -> list[int]:
        client = openai.AsyncOpenAI(base_url=address, api_key="x", max_retries=0, timeout=30)
        async with client:
            return await asyncio.gather(*(ask(client, k) for k in range(200)))

    backend = FakeBackend(reply, wait)
    with serving(backend, queue=200, keepalive=0.03) as server:
        tokens = asyncio.run(ask_all(f"{server.address}/v1"))
        assert [count < 0 for count in tokens] == [fate[str(k)][0] for k in range(200)]
        assert min(tokens) == -1
        total = sum(count for count in tokens if count > 0)
        assert total == sum(answer.cost.generated for answer in backend.answers)
        assert total == server.metric("bonbon_tokens_generated_total")
        drawn = sum(answer.generation.group.n for answer in backend.answers)
        assert server.metric("bonbon_candidates_drawn_total") == drawn
        assert server.metric("bonbon_candidates_failed_total") == len(backend.answers)
        assert server.metric("bonbon_chosen_reward_count") == len(backend.answers)
        assert server.metric('bonbon_request_seconds_count{route="/v1/completions"}') == 200
        assert backend.most == 8


# --- health, metrics, the log ---------------------------------------------------------------------


def test_health() -> None:
    backend = FakeBackend()
    with serving(backend) as server:
        assert server.get("/health").json() == {"status": "ok"}
        backend.health = False
        reply = server.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "unavailable"})


def test_no_model_yet() -> None:
    with serving(FakeBackend(names=())) as server:
        assert server.get("/v1/models").json() == {"object": "list", "data": []}
        assert_error(server.post("/v1/completions", TEXT), 503)


def test_metrics_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bonbon.serve")
    with serving(FakeBackend()) as server, serving(FakeBackend()) as other:
        server.post("/v1/completions", {"prompt": "a private prompt"})
        server.get("/v1/models/a/b/c?secret=1")
        server.get("/none%0Asuch")
        text = server.get("/metrics").text
        assert server.metric("bonbon_chosen_reward_count") == 1
        assert other.metric("bonbon_tokens_generated_total") == 0
    assert 'bonbon_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert 'bonbon_requests_total{route="/v1/models/{model:path}",status="404"} 1.0' in text
    # A client cannot make up labels.
    assert 'bonbon_requests_total{route="other",status="404"} 1.0' in text
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"POST /v1/completions 200 \d\.\d{3}s [0-9a-f]{32}", lines[0])
    assert any(line.startswith("GET /v1/models/a/b/c 404") for line in lines)
    assert any(line.startswith("GET /none%0Asuch 404") for line in lines)
    assert not any("private" in line or "secret" in line for line in lines)


# --- stopping -------------------------------------------------------------------------------------


def test_a_graceful_stop() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, concurrency=1) as server:
        with posted(server, TEXT) as running:
            until(lambda: backend.running == 1, "running")  # else either may come first
            with posted(server, TEXT) as waiting:
                until(lambda: server.server.service.admission.waiting == 1, "waiting")
                server.stop()
                until(lambda: bool(waiting), "turned away")
                assert assert_error(waiting[0], 503)["code"] == "stopping"
                assert server.get("/health").json() == {"status": "stopping"}
                assert_error(server.post("/v1/completions", TEXT), 503)
                assert server.get("/metrics").status_code == 200
                assert not running
                gate.open.set()
        assert running[0].status_code == 200
        server.thread.join(20)
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


def test_a_stream_that_has_begun_has_the_grace_too() -> None:
    gate = Gate()
    backend = FakeBackend(before=gate)
    with serving(backend, keepalive=0.02) as server:
        with posted(server, TEXT | {"stream": True}) as found:
            until(lambda: backend.running == 1, "running")
            time.sleep(0.1)  # comments
            server.server.handle_exit(signal.SIGTERM, None)
            time.sleep(1.2)  # longer than the library takes to notice
            gate.open.set()
        assert found[0].text.startswith(": waiting\n\n")
        assert found[0].text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_the_grace(stream: bool) -> None:
    backend = FakeBackend(before=Gate())
    with serving(backend, grace=0.1) as server:
        with posted(server, TEXT | {"stream": stream}) as found:
            until(lambda: backend.running == 1, "running")
            server.stop()
        assert assert_error(found[0], 503)["code"] == "stopping"
        assert len(backend.cancelled) == 1


def test_a_second_interrupt_hurries() -> None:
    backend = FakeBackend(before=Gate())
    with serving(backend, grace=600.0) as server:
        with posted(server, TEXT) as found:
            until(lambda: backend.running == 1, "running")
            for _ in range(2):
                server.server.handle_exit(signal.SIGINT, None)
        assert_error(found[0], 503)
        server.thread.join(20)
        assert len(backend.cancelled) == 1


SCRIPT = """
import asyncio, sys
from bonbon.serve.backend import BackendError
from bonbon.serve.config import ServeConfig
from bonbon.serve.run import listening, serve

class Backend:
    async def start(self):
        pass

    async def models(self):
        return ("tiny",)

    async def answer(self, job):
        print("running", flush=True)
        await asyncio.sleep(0.5)
        raise BackendError("the end", 409)

    async def close(self):
        await asyncio.sleep(0.01)
        print("closed", flush=True)

serve(ServeConfig(port=0), Backend)
print("torch" in sys.modules, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "BONBON_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"bonbon serves at (http://127\.0\.0\.1:\d+)/v1; Ctrl-C .*\n", line)
        assert found, process.communicate()
        replies: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: replies.append(
                httpx.post(f"{found[1]}/v1/completions", json=TEXT, timeout=30)
            )
        )
        thread.start()
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        thread.join(30)
    finally:
        process.kill()
    assert replies[0].json()["error"]["message"] == "the end"
    assert out == "closed\nFalse\n"
    assert process.returncode == 0
    # One line for the request, and nothing else.
    assert re.fullmatch(r"\S+ \S+ INFO POST /v1/completions 409 \S+ \S+\n", err), err


def test_an_address_that_is_taken_and_a_backend_that_cannot_start() -> None:
    class Broken(FakeBackend):
        async def start(self) -> None:
            raise BonbonError("there is no such model; name another")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BonbonError, match=rf"cannot listen on 127\.0\.0\.1, port {port}"):
            serve(ServeConfig(port=port), FakeBackend)
    backend = Broken()
    with pytest.raises(BonbonError, match="no such model"):
        serve(ServeConfig(port=0), lambda: backend)
    assert backend.closed


def test_small_writes_are_not_held_back() -> None:
    with listening(ServeConfig(port=0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_no_torch() -> None:
    code = (
        "import sys, bonbon.serve.run; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
