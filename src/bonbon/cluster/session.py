"""The Ray cluster that a command uses: an existing one, or one that it starts."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from bonbon.config.engine import PoolConfig, RayEngineConfig
from bonbon.system.errors import BonbonError, first_line

_CONNECT_TIMEOUT = 10.0  # seconds to reach a cluster's address
_CHECK_EVERY, _LOST_AFTER = (
    2.0,
    20.0,
)  # seconds between checks of the head, and until it counts as lost
_OBJECT_STORE_BYTES = 100 * 2**20  # bytes of shared memory: only shard numbers go through it


@contextmanager
def cluster(address: str | None) -> Iterator[ModuleType]:
    """Connect Ray to the cluster at `address`, or start one that is ended afterwards.

    Where the calling program is connected already, that connection is used and kept. Raises
    BonbonError when Ray is not installed or the cluster cannot be reached.
    """
    if address is not None:
        _reach(address)
    elif "ray" not in sys.modules:  # it reads these variables at import
        # Ray listens on every address of the machine: the token keeps others out.
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # for standard error too
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    with _quiet():
        try:
            _connect(ray, address)
            yield ray
        finally:
            ray.shutdown()


def _imported() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BonbonError(
            f"engine: ray needs Ray ({error}): pip install 'bonbon-align[ray]'"
        ) from error
    return ray


def _connect(ray: ModuleType, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        options |= {"address": "local"} | own
    else:
        options["address"] = address
    try:
        with _silent():
            ray.init(**options)
    except (Exception, SystemExit) as error:
        where = "on this machine" if address is None else f"at {address}"
        if any("Authentication" in type(it).__name__ for it in _causes(error)):
            raise BonbonError(
                f"the Ray cluster {where} asks for a token; set RAY_AUTH_MODE=token, and the token "
                "as it documents (RAY_AUTH_TOKEN, or ~/.ray/auth_token)"
            ) from error
        raise BonbonError(
            f"no Ray cluster {where} can be used: {first_line(error)}"
            + ("" if address is None else "; is it running (`ray start --head`), and this address?")
        ) from error


def _reach(address: str) -> None:
    """Raise BonbonError where nothing answers; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, and names that only Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except OSError as error:
        raise BonbonError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; start one "
            "(`ray start --head`), or correct engine.address"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Drop writes to standard error from outside Python; errors that matter are raised too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's reports of dead workers off the terminal; they are handled, and logged."""
    worker: Any = sys.modules["ray._private.worker"]
    printing = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printing


@contextmanager
def watched_head(ray: ModuleType) -> Iterator[None]:
    """Raise BonbonError once the cluster's head is lost.

    Ray itself waits for a minute and then ends the process without a message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a signal would reach the main thread
        return
    address: str = ray.get_runtime_context().gcs_address
    lost, over = threading.Event(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(address, lost, over), daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise BonbonError(
            f"the head of the Ray cluster, at {address}, cannot be reached any more; "
            "finished shards are kept, and the same command resumes"
        ) from None
    finally:
        over.set()
        watcher.join()


def _watch(address: str, lost: threading.Event, over: threading.Event) -> None:
    """Interrupt the main thread when the head has not answered for `_LOST_AFTER` seconds."""
    host, _, port = address.rpartition(":")
    answered = time.monotonic()
    while not over.wait(_CHECK_EVERY):
        with suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), _CHECK_EVERY).close()
            answered = time.monotonic()
        if time.monotonic() - answered > _LOST_AFTER:
            lost.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- room -----------------------------------------------------------------------------------------


def check_room(ray: ModuleType, pools: Mapping[str, PoolConfig]) -> None:
    """Raise BonbonError when the smallest pools do not fit the cluster; Ray would wait forever."""
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        has = total.get(resource, 0)
        needs = sum(pool.min * getattr(pool, field) for pool in pools.values())
        if needs > has:
            each = " and ".join(
                f"{pool.min} × {getattr(pool, field):g} for {name}" for name, pool in pools.items()
            )
            raise BonbonError(
                f"the workers need {needs:g} {resource}s ({each}) and the cluster has {has:g}; "
                f"lower {field} or min of engine.{', engine.'.join(pools)}"
            )
        largest = max((node.get(resource, 0) for node in nodes), default=0)
        for name, pool in pools.items():
            if getattr(pool, field) > largest:
                raise BonbonError(
                    f"a worker of engine.{name} needs {getattr(pool, field):g} {resource}s and no "
                    f"node has more than {largest:g}; lower engine.{name}.{field}"
                )


def pools_of(engine: RayEngineConfig, stages: list[str]) -> dict[str, PoolConfig]:
    """Return the stages' pools, by their names in the configuration."""
    pools = {"sample": ("samplers", engine.samplers), "score": ("scorers", engine.scorers)}
    return dict(pools[stage] for stage in stages)
