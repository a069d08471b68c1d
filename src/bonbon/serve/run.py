"""Running the server until a signal stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from bonbon.serve.app import create_app, create_service
from bonbon.serve.backend import Backend
from bonbon.serve.config import ServeConfig, api_key
from bonbon.serve.service import Service
from bonbon.system.errors import BonbonError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_TICK = 0.05  # seconds between looks at what still runs
_LAST_WORDS = 5  # seconds in which answers that are ready can be sent


def serve(
    config: ServeConfig,
    backend_factory: Callable[[], Backend],
    passthrough: frozenset[str] = frozenset(),
) -> None:
    """Run the server; returns after SIGINT (Ctrl-C) or SIGTERM.

    `backend_factory` is called in the event loop. On a signal, what waits and whatever comes gets a
    503, what runs has `config.grace` seconds, and the backend is closed; a second Ctrl-C hurries.

    Raises BonbonError when there is no key where one is needed, when the address is taken, or when
    the backend cannot start.
    """
    api_key(config)
    _log_to_stderr()
    asyncio.run(_serve(config, backend_factory, passthrough))


async def _serve(
    config: ServeConfig, backend_factory: Callable[[], Backend], passthrough: frozenset[str]
) -> None:
    with listening(config) as listener:
        backend = backend_factory()
        try:
            await backend.start()
            server = GracefulServer(create_service(config, backend, passthrough))
            with _signals(server):
                await server.serve(sockets=[listener])
        finally:
            await backend.close()


class GracefulServer(uvicorn.Server):
    """uvicorn that answers with 503 while it waits for what runs; handles no signals."""

    def __init__(self, service: Service) -> None:
        self.service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: uvicorn would raise the signals again before the backend is closed."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for listener in sockets or []:
            print(f"bonbon serves at {address_of(listener)}; Ctrl-C stops it", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running jobs finish, then close the connections."""
        self.service.stop()
        end = time.monotonic() + self.service.config.grace
        while self.service.admission.running and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_TICK)
        self.service.abort()
        await super().shutdown(sockets)


def address_of(listener: socket.socket) -> str:
    """Where clients reach a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """The socket that a configuration names. Raises BonbonError when it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise BonbonError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}; "
            "choose another serve.host or serve.port"
        ) from error
    # Connections inherit it. Headers and body are two writes, and without it the second one waits
    # 40 ms for the client's acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listener:
        yield listener


@contextlib.contextmanager
def _signals(server: GracefulServer) -> Iterator[None]:
    """Signals stop the server; only the main thread can be told of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.handle_exit, number, None)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _log_to_stderr() -> None:
    """Show the access log, unless the program has decided where logs go."""
    log = logging.getLogger("bonbon.serve")
    if not logging.getLogger().handlers and not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
