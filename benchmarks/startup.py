"""Start-up time of the command line, compared with the import of torch that it avoids.

    python benchmarks/startup.py

Prints the median wall-clock time of several runs of each command, and its ratio to `import torch`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "bonbon --help": [sys.executable, "-m", "bonbon", "--help"],
    "bonbon frontier": [sys.executable, "-m", "bonbon", "frontier"],
}
RUNS = 9


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    torch_time = statistics.median(times["import torch"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<16} {median:6.3f} s   {median / torch_time:5.2f} of import torch")


if __name__ == "__main__":
    main()
