"""Training of one model by several processes, started by `accelerate launch` or `torchrun`.

The processes do the same work in step, each on its share of a batch. Only the main process holds
the run's folder, writes and prints; it broadcasts what the others need to know. Ranks are read from
the environment variables that every launcher sets, so a single process never loads torch for them.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from bonbon.system.errors import BonbonError

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # how long processes wait while the main one saves or measures
_HEAD_START = 20.0  # seconds that the main process has to print an error that all processes have


def process_count() -> int:
    """Return how many processes train together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def process_index() -> int:
    """Return this process' index among them, from 0."""
    return _number("RANK", 0)


def is_main_process() -> bool:
    """Return whether this process, the first one, holds the folder, writes and prints."""
    return process_index() == 0


def wait_for_everyone() -> None:
    """Wait until every process has called this."""
    if process_count() > 1:
        _join().barrier()


def from_main_process(call: Callable[[], T]) -> T:
    """Call in the main process only, and return the result in every process.

    If the call raises, the other processes wait until the launcher ends them.
    """
    if process_count() == 1:
        return call()
    values = [call() if is_main_process() else None]
    _join().broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def from_machine(call: Callable[[], T]) -> T:
    """Call in the first process of each machine; return its result in all its processes.

    If a call raises, the other processes wait until the launcher ends them.
    """
    if process_count() == 1:
        return call()
    first = _number("LOCAL_RANK", 0) == 0
    values: list[Any] = [None] * process_count()
    _join().all_gather_object(values, (_machine(), call()) if first else None)
    return dict(filter(None, values))[_machine()]


def let_the_main_process_speak() -> None:
    """Wait a little before an error is printed, except in the main process.

    An error that all processes have is then printed once: the launcher ends the others first.
    """
    if not is_main_process():
        time.sleep(_HEAD_START)


def refuse_several_processes(command: str) -> None:
    """Raise BonbonError if a launcher started several processes of a one-process `command`."""
    if process_count() > 1:
        raise BonbonError(
            f"`bonbon {command}` works in one process and {process_count()} were started; only "
            "`bonbon train` can be launched by torchrun or accelerate"
        )


def leave() -> None:
    """Leave the process group at the end of the common work."""
    if process_count() > 1:
        gc.collect()  # a model's reducer that is freed after its group may hang
        _join().destroy_process_group()


def _machine() -> tuple[str, str]:
    """Return an identity of this machine; containers on one machine count as different."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _join():  # type: ignore[no-untyped-def]  # the module torch.distributed
    import torch.distributed as dist

    if not dist.is_initialized():
        # Without a named backend it is gloo for the CPU, and the accelerator's own if there is one.
        dist.init_process_group(timeout=_PATIENCE)
    return dist
