"""Processes on machines that this machine plays: what each is told, and who was asked.

    python -m torch.distributed.run --standalone --nproc-per-node 4 tests/support/one_machine.py OUT

MACHINES in the environment names the machine of each. Process r writes OUT/r.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bonbon.system import processes as distributed


def main() -> None:
    rank, machines = int(os.environ["RANK"]), os.environ["MACHINES"].split()
    name = machines[rank]
    os.environ["LOCAL_RANK"] = str(machines[:rank].count(name))
    distributed._machine = lambda: (name, "")
    asked = 0

    def answer() -> str:
        nonlocal asked
        asked += 1
        return f"{name}, by process {rank}"

    told = distributed.from_machine(answer)
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps([told, asked]))
    distributed.leave()


if __name__ == "__main__":
    main()
