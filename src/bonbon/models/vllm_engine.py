"""Drawing and scoring with vLLM's offline engine (extra `vllm`).

What is drawn is the same distribution as with `TransformersSampler`: nothing of the model's
`generation_config.json` but its end tokens, and log-probabilities with temperature, top-k and top-p
in them. The draws themselves differ, since vLLM has random numbers of its own: completion k of a
prompt has the seed `random_streams.request_seed` + k. The same seed gives the same completions as
far as arithmetic goes; matrix products of other batch shapes may differ in the last bits, and where
a draw is that close, another token comes out.

vLLM starts processes that import the main module again, so a script of your own needs its
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
    """The package, which then says errors alone. Raises BonbonError where it is not installed.

    `VLLM_LOGGING_LEVEL` in the environment shows more.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BonbonError("vLLM is not installed: pip install 'bonbon-align[vllm]'")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers what it runs
    try:
        with _own_output():
            import vllm
    except Exception as error:  # a build for another CUDA, say
        raise BonbonError(f"vLLM is installed but does not load: {error_message(error)}") from error
    return vllm


@contextmanager
def _own_output() -> Iterator[IO[bytes] | None]:
    """Gives what is printed meanwhile, and by processes started meanwhile for good, a file.

    It holds why an engine did not start, which the exception in this process does not say. None,
    and nothing taken, where the user set vLLM's logging level.
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
        what: the model in words, for errors.
        settings: the user's.
        arguments: of `vllm.LLM`, ours.

    Raises BonbonError, with the reason that the engine's processes gave, when it does not start.
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
            with _own_output() as self._output:
                self.llm = vllm.LLM(**known, **settings.engine)
        except Exception as error:  # of whatever kind: vLLM, torch, the driver
            raise BonbonError(
                f"vLLM cannot run {what}: {self._reason(error)} (VLLM_LOGGING_LEVEL=INFO shows "
                "all that it says)"
            ) from error
        self._guard = _guard_of(set(multiprocessing.active_children()) - set(earlier))

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Raises what goes wrong meanwhile as a BonbonError."""
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
        """Wakes vLLM (0.32) up, which waits for ever for what a killed process would have sent."""
        core = self.llm.llm_engine.engine_core
        resources = getattr(core, "resources", None)  # None where the engine has no processes
        while resources is not None and not done.wait(_WATCH_SECONDS):
            if resources.engine_dead:
                core.outputs_queue.put_nowait(RuntimeError("the engine is dead"))
                return

    def close(self) -> None:
        """End its processes, which frees their memory; a second call does nothing."""
        with suppress(Exception):  # one that has died is as good as closed
            self.llm.llm_engine.engine_core.shutdown()
        if self._guard is not None:
            self._guard.communicate(b"\n")
            self._guard = None

    def _reason(self, error: Exception, start: int = 0) -> str:
        """What went wrong: the first error that its processes report where they are to blame."""
        dead = type(error).__name__ == "EngineDeadError"
        if (dead or "root cause" in str(error)) and self._output is not None:
            self._output.seek(start)
            said = self._output.read().decode(errors="replace")
            if found := _REASON.search(said):
                return f"{found[1]}: {found[2]}"
        if dead:
            return "its process has ended, as when the machine runs out of memory"
        return error_message(error)


def _guard_of(processes: Iterable[BaseProcess]) -> subprocess.Popen[bytes] | None:
    """A shell that ends an engine's processes when this one is killed.

    vLLM (0.32) would leave them, and with them the memory that the next try needs. The shell's
    input ends with this process; a line on it says that all is well.
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
    """A model's folder or hub id as vLLM takes it, which knows no `~`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def device_type(device: str) -> str:
    """The type of device that the installed vLLM runs on; BonbonError for another than `device`."""
    from vllm.platforms import current_platform

    built_for = str(current_platform.device_type)
    if device not in ("auto", BALANCED, built_for):
        raise BonbonError(
            f"device {device!r} cannot be had: the installed vLLM runs on {built_for!r}; leave "
            "device at auto, and choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    return built_for


def dtype_name(dtype: str, device: str) -> str:
    return str(pick_dtype(dtype, torch.device(device))).removeprefix("torch.")
