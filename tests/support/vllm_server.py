"""A true vLLM server for tests, with the Python that `make test-vllm` sees to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

# Settings of its own that must be turned off, or every completion would be the same.
SERVER_SETTINGS = '{"top_k": 1, "temperature": 0.1, "repetition_penalty": 1.5}'
START_SECONDS = 240


def vllm_python() -> Path:
    """Where `scripts/setup_vllm.sh` puts it; BONBON_VLLM_PYTHON names another one.

    Skips the test where there is none.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("BONBON_VLLM_ENV") or Path(cache) / "bonbon" / "vllm-env"
    python = Path(os.environ.get("BONBON_VLLM_PYTHON") or Path(folder) / "bin" / "python")
    if not python.exists():
        pytest.skip(f"there is no {python}; scripts/setup_vllm.sh makes it")
    return python


class Server:
    """A vLLM server in a process group of its own."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        command = [
            str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
            *options,
        ]  # fmt: skip
        limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | limits,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers; a failure of the test where it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url.removesuffix("/v1") + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"vLLM did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """Server and engine at once, as when a machine runs out of memory."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
