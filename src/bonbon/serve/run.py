"""Runs the server until a signal stops it."""

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
_TICK = 0.05  # seconds between checks of what still runs
_LAST_WORDS = 5  # seconds in which answers that are ready can be sent


def serve(
    config: ServeConfig,
    backend_factory: Callable[[], Backend],
    passthrough: frozenset[str] = frozenset(),
) -> None:
    """Run the server; return after SIGINT (Ctrl-C) or SIGTERM.

    `backend_factory` is called in the event loop. After a signal, waiting and new requests get a
    503, running jobs have `config.grace` seconds to finish, and the backend is closed. A second
    Ctrl-C skips the wait.

    Raises BonbonError when a key is needed and missing, when the address is in use, or when the
    backend cannot start.
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
    """A uvicorn server that answers with 503 while running jobs finish; handles no signals."""

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
        """Do nothing: uvicorn would raise the signals again before the backend is closed."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print the address."""
        await super().startup(sockets)
        for listener in sockets or []:
            print(f"bonbon serves at {address_of(listener)}; Ctrl-C stops it", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running jobs, then close the connections."""
        self.service.stop()
        end = time.monotonic() + self.service.config.grace
        while self.service.admission.running and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_TICK)
        self.service.abort()
        await super().shutdown(sockets)


def address_of(listener: socket.socket) -> str:
    """Return the URL at which clients reach a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """Yield a listening socket. Raises BonbonError when the address cannot be used."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise BonbonError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}; "
            "choose another serve.host or serve.port"
        ) from error
    # Connections inherit this option. Headers and body are two writes; without it the second waits
    # 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listener:
        yield listener


@contextlib.contextmanager
def _signals(server: GracefulServer) -> Iterator[None]:
    """Let signals stop the server; only the main thread can receive them."""
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
    """Write the access log to stderr, unless the program has configured logging."""
    log = logging.getLogger("bonbon.serve")
    if not logging.getLogger().handlers and not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
