"""Drawing and scoring with vLLM's offline engine (extra `vllm`).

Completions come from the same distribution as with `TransformersSampler`: of the model's
`generation_config.json` only the end tokens are used, and log-probabilities include temperature,
top-k and top-p. The draws themselves differ, since vLLM has its own random numbers: completion k of
a prompt has the seed `random_streams.request_seed` + k. The same seed gives the same completions up
to rounding: matrix products of other batch shapes may differ in the last bits, and then a draw very
close to a boundary may give another token.

vLLM starts processes that import the main module again, so your own script needs
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

import torch
from pydantic import ValidationError

from bonbon.config.renamed import REMOVED
from bonbon.config.sampling import VllmSettings
from bonbon.models.loading import BALANCED, pick_dtype
from bonbon.system.errors import BonbonError, first_line

_WATCH_SECONDS = 1.0


_REASON = re.compile(r"\b(\w*(?:Error|Exception)): (.+)")


# --- the engine -----------------------------------------------------------------------------------


def import_vllm() -> Any:
    """Import vLLM, which then logs only errors. Raises BonbonError where it is not installed.

    Set `VLLM_LOGGING_LEVEL` in the environment to log more.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BonbonError("vLLM is not installed: pip install 'bonbon-align[vllm]'")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # or it would report what it runs
    try:
        with own_output():
            import vllm
    except Exception as error:  # for example a build for another CUDA
        raise BonbonError(f"vLLM is installed but does not load: {error_message(error)}") from error
    return vllm


@contextmanager
def own_output() -> Iterator[IO[bytes] | None]:
    """Redirect output to a temporary file meanwhile; of processes started meanwhile, permanently.

    The file has the reason why an engine did not start, which this process's exception lacks.
    Where the user has set vLLM's logging level, nothing is redirected and there is no file (None).
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield None
        return
    output = tempfile.TemporaryFile()  # noqa: SIM115 (the processes keep it)
    kept = [os.dup(1), os.dup(2)]
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        _point_at(output.fileno(), output.fileno())
        yield output
    finally:
        _point_at(*kept)
        for number in kept:
            os.close(number)
        del os.environ["VLLM_LOGGING_LEVEL"]


def _point_at(stdout: int, stderr: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


class Engine:
    """A running `vllm.LLM` and the processes behind it.

    Args:
        what: names the model in errors.
        settings: the user's settings.
        arguments: our arguments of `vllm.LLM`.

    Raises BonbonError when the engine does not start, with the reason its processes printed.
    """

    def __init__(self, what: str, settings: VllmSettings, **arguments: Any) -> None:
        vllm = import_vllm()
        self._what = what
        self._output: IO[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        earlier = multiprocessing.active_children()
        quiet = {"use_tqdm_on_load": False, "disable_log_stats": True}
        known = {**settings.model_dump(exclude={"engine", "name"}), **quiet, **arguments}
        _check_settings(settings, known)
        try:
            with own_output() as self._output:
                self.llm = vllm.LLM(**known, **settings.engine)
        except Exception as error:  # of whatever kind: vLLM, torch, the driver
            raise BonbonError(
                f"vLLM cannot run {what}: {self._reason(error)} (VLLM_LOGGING_LEVEL=INFO shows "
                "its whole log)"
            ) from error
        self._guard = _guard_of(set(multiprocessing.active_children()) - set(earlier))

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the model's vocabulary."""
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Raise every exception of the engine meanwhile as a BonbonError."""
        start = 0 if self._output is None else self._output.seek(0, os.SEEK_END)
        done = Event()
        Thread(target=self._watch, args=(done,), daemon=True).start()
        try:
            yield
        except Exception as error:
            raise BonbonError(
                f"vLLM failed while it ran {self._what}: {self._reason(error, start)}"
            ) from error
        finally:
            done.set()

    def _watch(self, done: Event) -> None:
        """Raise an error in vLLM (0.32) when its process is dead, or it would wait for ever."""
        core = self.llm.llm_engine.engine_core
        resources = getattr(core, "resources", None)  # None where the engine has no processes
        while resources is not None and not done.wait(_WATCH_SECONDS):
            if resources.engine_dead:
                core.outputs_queue.put_nowait(RuntimeError("the engine is dead"))
                return

    def close(self) -> None:
        """End the engine's processes, which frees their memory; a second call does nothing."""
        with suppress(Exception):  # its process may have ended already
            self.llm.llm_engine.engine_core.shutdown()
        if self._guard is not None:
            self._guard.communicate(b"\n")
            self._guard = None

    def _reason(self, error: Exception, start: int = 0) -> str:
        """Return the reason of an error: the first one its processes printed, if it is theirs."""
        dead = type(error).__name__ == "EngineDeadError"
        if (dead or "root cause" in str(error)) and self._output is not None:
            self._output.seek(start)
            printed = self._output.read().decode(errors="replace")
            if reason := _REASON.search(printed):
                return f"{reason[1]}: {reason[2]}"
        if dead:
            return "its process has ended, as when the machine runs out of memory"
        return error_message(error)


def _guard_of(processes: Iterable[BaseProcess]) -> subprocess.Popen[bytes] | None:
    """Start a shell that ends an engine's processes when this process is killed.

    vLLM (0.32) would leave them running, with the memory that a re-run needs. The shell's input
    ends when this process does; a line on it means that the engine was closed in order.
    """
    pids = [str(process.pid) for process in processes]
    if not pids:
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r line || kill -9 "$@"', "sh", *pids],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # or Ctrl-C would end it first
    )


def error_message(error: Exception) -> str:
    """Return an error of vLLM in one line."""
    if isinstance(error, ValidationError):  # whose first line counts errors
        return error.errors()[0]["msg"]
    return first_line(error)


def _check_settings(settings: VllmSettings, known: dict[str, Any]) -> None:
    if "data_parallel_size" in settings.engine:
        reason = REMOVED["VllmSettings"]["data_parallel_size"]
        raise BonbonError(
            f"engine.data_parallel_size of the vLLM settings is not supported: {reason}"
        )
    for name in sorted(settings.engine.keys() & known.keys()):
        raise BonbonError(
            f"engine.{name} of the vLLM settings cannot be set there; it is "
            + ("a setting of its own" if name in type(settings).model_fields else "BoNBoN's own")
        )


def model_place(name: str) -> str:
    """Return a model's folder or hub id with `~` expanded, as vLLM needs it."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def device_type(device: str) -> str:
    """Return the type of device of the installed vLLM. Raises BonbonError if `device` differs."""
    from vllm.platforms import current_platform

    built_for = str(current_platform.device_type)
    if device not in ("auto", BALANCED, built_for):
        raise BonbonError(
            f"device {device!r} cannot be used: the installed vLLM runs on {built_for!r}; leave "
            "device at auto, and choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    return built_for


def dtype_name(dtype: str, device: str) -> str:
    """Return the name of a dtype as vLLM takes it; `auto` by the device."""
    return str(pick_dtype(dtype, torch.device(device))).removeprefix("torch.")
