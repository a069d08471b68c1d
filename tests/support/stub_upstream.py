"""An OpenAI-compatible server over a real socket that fails as servers do, and counts its tokens.

    async with StubUpstream(fault=some_faults(0.2)) as stub:
        ...  # stub.url

    with serving(StubUpstream()) as stub:  # from synchronous code, in a thread
        ...

Every completion it gives has a text of its own, so that what it handed out can be looked up by the
text. With a seed the same request has the same completion. It also scores by vLLM's three routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

Fault = Callable[[str, int], str]
FAULTS = (
    "500",
    "503",
    "429",
    "reset before headers",
    "reset after headers",
    "truncated",
    "slow",
    "error body",
    "no choices",
)
SCORING = ("/pooling", "/classify", "/score")  # vLLM's routes, which are not under /v1


def no_fault(_request: str, _attempt: int) -> str:
    return ""


def some_faults(share: float, kinds: tuple[str, ...] = FAULTS) -> Fault:
    """A fault for `share` of the requests, the same ones for the same requests in every run."""

    def fault(request: str, attempt: int) -> str:
        digest = hashlib.blake2b(f"{request}\0{attempt}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        is_faulty = number % 1000 < share * 1000
        return kinds[number // 1000 % len(kinds)] if is_faulty else ""

    return fault


@contextmanager
def serving(stub: StubUpstream) -> Iterator[StubUpstream]:
    """The stub over a socket, in a thread with an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(stub.start(), loop).result()
        yield stub
    finally:
        asyncio.run_coroutine_threadsafe(stub.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class StubUpstream:
    """The server; attributes say how it answers, and what happened.

    `fault(request, attempt)` names what goes wrong with the attempt-th sending of a request body,
    or "". `delay` is how many seconds a good answer takes. `reply` changes a good answer. `ids` are
    the token ids of a completion's text, which are then counted and, where asked for, sent.
    `context` is what /models says of it. `score` is the reward of what is asked about: a text, a
    pair of texts, or messages; without a `template` these are refused.
    """

    def __init__(
        self,
        fault: Fault = no_fault,
        delay: float = 0.0,
        key: str | None = None,
        owned_by: str = "someone",
        models: tuple[str, ...] = ("stub",),
        reply: Callable[[dict[str, Any]], Any] = lambda found: found,
        retry_after: str = "0",
        ids: Callable[[str], list[int]] | None = None,
        context: int | None = None,
        score: Callable[[Any], Any] = lambda asked: float(len(str(asked))),
        template: bool = True,
    ) -> None:
        self.ids, self.context, self.score, self.template = ids, context, score, template
        self.fault, self.delay, self.key, self.reply = fault, delay, key, reply
        self.owned_by, self.models, self.retry_after = owned_by, models, retry_after
        self.tokens: dict[str, int] = {}  # of each completion that was sent whole
        self.lost = 0  # tokens of replies that named them and held no completion
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.models_fault = ""  # a status of /models, or "slow"
        self.cookie = ""
        self.faults: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.models_asked = 0
        self.abandoned = 0  # requests whose client went away
        self.busy = self.most_busy = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._connections: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # --- HTTP -------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._one_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in headers.items()}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        self.headers.append(headers)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            said = f"Incorrect key: {headers.get('authorization')}"
            return await self._send(writer, 401, {"error": {"message": said}})
        if method == "GET" and path == "/v1/models":
            self.models_asked += 1
            if self.models_fault:
                return await self._fail(reader, writer, self.models_fault, {})
            more = {} if self.context is None else {"max_model_len": self.context}
            listed = [{"id": name, "owned_by": self.owned_by} | more for name in self.models]
            return await self._send(writer, 200, {"object": "list", "data": listed})
        if path not in (*SCORING, "/v1/completions", "/v1/chat/completions"):
            return await self._send(writer, 404, {"detail": "Not Found"})
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            return await self._complete(reader, writer, path, raw.decode())
        finally:
            self.busy -= 1

    async def _complete(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, raw: str
    ) -> bool:
        body = json.loads(raw)
        attempt = self.asked[raw]
        self.asked[raw] += 1
        self.bodies.append(body)
        self.paths.append(path)
        name = self.fault(raw, attempt)
        self.faults[name] += 1
        if path in SCORING and "messages" in body and not self.template:
            said = "default chat template is no longer allowed"
            return await self._send(writer, 400, {"error": {"message": said}})
        if path in SCORING:
            tokens, found = {}, self._scored(body, path)
        else:
            tokens, found = self._completions(body, "chat" in path)
        found = self.reply(found)
        if name:
            return await self._fail(reader, writer, name, found)
        if not await self._wait(reader, self.delay):
            return False
        await self._send(writer, 200, found)
        self.tokens |= tokens
        return True

    async def _wait(self, reader: asyncio.StreamReader, seconds: float) -> bool:
        """Whether the client is still there after so many seconds."""
        try:
            await asyncio.wait_for(reader.read(1), seconds)
        except TimeoutError:
            return True
        except ConnectionError:
            pass
        self.abandoned += 1
        return False

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, found: Any, cut: int = 0, **more: str
    ) -> bool:
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        names = {"Content-Length": str(len(content)), **more}
        if self.cookie:
            names["Set-Cookie"] = self.cookie
        head = "".join(f"{name}: {value}\r\n" for name, value in names.items())
        writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode())
        writer.write(content[: len(content) - cut])
        await writer.drain()
        return True

    async def _fail(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, found: Any
    ) -> bool:
        content = json.dumps(found).encode()
        if name.isdigit():
            error = {"message": f"no, status {name}", "type": "x", "param": "p", "code": "c"}
            more = {"Retry-After": self.retry_after} if name == "429" else {}
            return await self._send(writer, int(name), {"error": error}, **more)
        if name == "slow":
            return await self._wait(reader, 60.0)
        if name == "garbage":
            return await self._send(writer, 200, b"<html>\xff busy</html>")
        if name == "truncated":
            return await self._send(writer, 200, content[:-9])
        if name == "error body":
            return await self._send(writer, 200, {"error": {"message": "out of memory"}})
        if name == "no choices":
            self.lost += found["usage"]["completion_tokens"]
            return await self._send(writer, 200, {**found, "choices": []})
        if name == "reset after headers":
            await self._send(writer, 200, content, cut=len(content) // 2)
        linger = struct.pack("ii", 1, 0)  # so that closing resets the connection
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return False

    # --- completions ------------------------------------------------------------------------------

    def _scored(self, body: dict[str, Any], path: str) -> dict[str, Any]:
        """What vLLM 0.32 answers."""
        if path == "/score":
            item = {"score": self.score((body["text_1"], body["text_2"]))}
        else:
            value = self.score(body.get("messages") or body.get("input"))
            item = {"data" if path == "/pooling" else "probs": [value]}
        return {"object": "list", "data": [{"index": 0} | item]}

    def _completions(
        self, body: dict[str, Any], chat: bool
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """The texts with their tokens' numbers, and the reply; the i-th has the seed + i."""
        asked = body.get("messages") or body.get("prompt")
        names = [f"arrival {len(self.bodies)}.{i}" for i in range(body.get("n", 1))]
        if "seed" in body:
            names = [str(body["seed"] + i) for i in range(len(names))]
        tokens, choices = {}, []
        for i, name in enumerate(names):
            text, count, choice = self._completion(body, asked, name, chat)
            tokens[text] = count
            choices.append({"index": i} | choice)
        prompt_tokens = len(asked if isinstance(asked, list) and not chat else json.dumps(asked))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sum(tokens.values())}
        return tokens, {"object": "completion", "choices": choices, "usage": usage}

    def _completion(
        self, body: dict[str, Any], asked: Any, name: str, chat: bool
    ) -> tuple[str, int, dict[str, Any]]:
        """A text of its own, its number of tokens, and the choice that it is in."""
        prompt = json.dumps(asked)
        digest = hashlib.blake2b(f"{prompt}\0{name}".encode(), digest_size=16).hexdigest()
        count = 2 + int(digest[:4], 16) % 7
        words = [f" {digest[:12]}", *(f" w{i}" for i in range(1, count))]
        text = "".join(words)
        choice: dict[str, Any] = {"finish_reason": "stop", "logprobs": None}
        if self.ids is not None:
            token_ids = self.ids(text)
            words, count = [f"token {i}" for i in token_ids], len(token_ids)
            if body.get("return_token_ids"):
                choice |= {"token_ids": token_ids, "prompt_token_ids": asked}
        logprobs = [-0.25 * (i + 1) for i in range(count)]
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
            if body.get("logprobs"):
                choice["logprobs"] = _chat_logprobs(words, logprobs, body["top_logprobs"])
        else:
            choice["text"] = text
            if body.get("logprobs") is not None:
                choice["logprobs"] = _legacy_logprobs(words, logprobs, body["logprobs"])
        return text, count, choice


def _chat_logprobs(words: list[str], logprobs: list[float], top: int) -> dict[str, Any]:
    def others(i: int) -> list[dict[str, Any]]:
        found = [{"token": words[i], "logprob": logprobs[i]}]
        return (found + [{"token": f" x{j}", "logprob": -5.0 - j} for j in range(top)])[:top]

    return {
        "content": [
            {"token": word, "logprob": logprob, "bytes": None, "top_logprobs": others(i)}
            for i, (word, logprob) in enumerate(zip(words, logprobs, strict=True))
        ]
    }


def _legacy_logprobs(words: list[str], logprobs: list[float], top: int) -> dict[str, Any]:
    found = _chat_logprobs(words, logprobs, top)["content"]
    tops = [{t["token"]: t["logprob"] for t in item["top_logprobs"]} for item in found]
    return {"tokens": words, "token_logprobs": logprobs, "top_logprobs": tops}
