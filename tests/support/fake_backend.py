"""A backend that is made up, and servers in front of it, for the tests of `bonbon serve`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from bonbon.decoding.strategy import Generation
from bonbon.groups.group import Group
from bonbon.sampling.cost import Cost
from bonbon.serve.app import create_service
from bonbon.serve.backend import Answer, AnswerJob, Choice, TokenLogprob
from bonbon.serve.config import ServeConfig
from bonbon.serve.run import GracefulServer, listening

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Once"}
TOKENS = 7  # a candidate's, in the made-up backend
KEY = "sk-a-key-of-the-tests"


def made_up_answer(job: AnswerJob) -> Answer:
    """Candidates "candidate k of PROMPT", rewards k, so that the last one is the best."""
    n = job.sampling.n
    prompt = job.prompt if isinstance(job.prompt, str) else job.prompt[-1]["content"]
    group = Group(
        prompt_id=job.request_id,
        prompt=job.prompt,
        prompt_token_ids=(1, 2, 3),
        completions=tuple(f"candidate {k} of {prompt}" for k in range(n)),
        token_ids=((5,) * TOKENS,) * n,
        logprobs=(-1.0,) * n,
        finish_reasons=("stop", "length") * (n // 2) + ("stop",) * (n % 2),
        rewards=tuple(float(k) for k in range(n)),
    )
    cost = Cost(generated=TOKENS * n, prefilled=3, reward_calls=n, seconds=0.5)
    logprobs = None
    if job.logprobs is not None:
        others = (("b", -0.5), ("c", float("-inf")))[: job.logprobs]
        logprobs = (TokenLogprob("é", -0.25, others), TokenLogprob("\ufffd", float("-inf")))
    choices = tuple(
        Choice(k, group.completions[k], group.finish_reasons[k], float(k), logprobs)
        for k in reversed(range(n))
    )
    return Answer(choices[: job.choices], 3, cost, Generation(group, n - 1, cost), failed=1)


@dataclass
class FakeBackend:
    """Answers by a function of the job, and notes what becomes of each."""

    reply: Callable[[AnswerJob], Answer] = made_up_answer
    before: Callable[[AnswerJob], Awaitable[None]] | None = None
    names: tuple[str, ...] = ("tiny", "org/other")
    health: bool = True
    jobs: list[AnswerJob] = field(default_factory=list)
    cancelled: list[AnswerJob] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    running: int = 0
    most: int = 0
    closed: bool = False

    async def start(self) -> None:
        pass

    async def models(self) -> tuple[str, ...]:
        return self.names

    async def answer(self, job: AnswerJob) -> Answer:
        self.jobs.append(job)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.before is not None:
                await self.before(job)
            self.answers.append(self.reply(job))
            return self.answers[-1]
        except asyncio.CancelledError:
            self.cancelled.append(job)
            raise
        finally:
            self.running -= 1

    async def healthy(self) -> bool:
        return self.health

    async def close(self) -> None:
        self.closed = True


class Gate:
    """Holds jobs until it is opened, from another thread."""

    def __init__(self) -> None:
        self.open = threading.Event()

    async def __call__(self, job: AnswerJob) -> None:
        while not self.open.is_set():
            await asyncio.sleep(0.005)


@dataclass
class Running:
    """A server in a thread."""

    server: GracefulServer
    port: int
    thread: threading.Thread
    http: httpx.Client

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        defaults = {"api_key": KEY, "max_retries": 0, "http_client": self.http}
        return openai.OpenAI(base_url=f"{self.address}/v1", **(defaults | options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def post_bytes(
        self, path: str, content: bytes | Iterator[bytes], media_type: str | None
    ) -> httpx.Response:
        headers = {} if media_type is None else {"Content-Type": media_type}
        return self.http.post(path, content=content, headers=headers)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (.*)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def stop(self) -> None:
        self.server.should_exit = True


@contextlib.contextmanager
def serving(
    backend: FakeBackend, passthrough: tuple[str, ...] = (), **values: Any
) -> Iterator[Running]:
    config = ServeConfig(port=0, **values)
    server = GracefulServer(create_service(config, backend, frozenset(passthrough)))
    with listening(config) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        port = listener.getsockname()[1]
        http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=30,
            trust_env=False,
            verify=False,
            limits=httpx.Limits(max_keepalive_connections=None),
        )
        running = Running(server, port, thread, http)
        thread.start()
        try:
            with http:
                yield running
        finally:
            running.stop()
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.005)


def assert_error(reply: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    return error
