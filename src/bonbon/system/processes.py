"""Several processes that train one model, as `accelerate launch` and `torchrun` start them.

They do the same work in step, each on its share of a batch. The main process alone holds the run's
folder, writes and speaks; where that decides what the others do next, they are told. Who is who is
read off the environment that every launcher sets, so a lone process never loads torch for it.
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

_PATIENCE = timedelta(hours=1)  # of processes that wait while the main one saves or measures
_HEAD_START = 20.0  # seconds in which the main process says what all processes have found


def process_count() -> int:
    """How many processes train together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def process_index() -> int:
    """This process' number among them, from 0."""
    return _number("RANK", 0)


def is_main_process() -> bool:
    """Whether this process holds the folder, writes and speaks: the first one, or the only one."""
    return process_index() == 0


def wait_for_everyone() -> None:
    """Return once every process has called this."""
    if process_count() > 1:
        _join().barrier()


def from_main_process(call: Callable[[], T]) -> T:
    """What `call` returns in the main process, in every process; the others do not call it.

    Where it raises in the main process the others wait until the launcher ends them.
    """
    if process_count() == 1:
        return call()
    values = [call() if is_main_process() else None]
    _join().broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def from_machine(call: Callable[[], T]) -> T:
    """What `call` returns in the first process of this machine, in all processes of the machine.

    Where it raises the others wait until the launcher ends them.
    """
    if process_count() == 1:
        return call()
    first = _number("LOCAL_RANK", 0) == 0
    values: list[Any] = [None] * process_count()
    _join().all_gather_object(values, (_machine(), call()) if first else None)
    return dict(filter(None, values))[_machine()]


def let_the_main_process_speak() -> None:
    """Before an error is shown: the other processes wait a little.

    What all of them have found is then said once, as the launcher ends them with the main process.
    """
    if not is_main_process():
        time.sleep(_HEAD_START)


def refuse_several_processes(command: str) -> None:
    """Raise BonbonError where a launcher started several processes of a `command` for one."""
    if process_count() > 1:
        raise BonbonError(
            f"`bonbon {command}` works in one process and {process_count()} were started; only "
            "`bonbon train` can be launched by torchrun or accelerate"
        )


def leave() -> None:
    """Part from the other processes, at the end of what is done together."""
    if process_count() > 1:
        gc.collect()  # a model's reducer that went after its group could hang
        _join().destroy_process_group()


def _machine() -> tuple[str, str]:
    """What tells this machine from others; containers of one machine have other names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _join():  # type: ignore[no-untyped-def]  # the module torch.distributed
    import torch.distributed as dist

    if not dist.is_initialized():
        # No backend is named: gloo for the CPU, beside that of the accelerator if there is one.
        dist.init_process_group(timeout=_PATIENCE)
    return dist
