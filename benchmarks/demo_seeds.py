"""The demo over several seeds: the share of best-of-8's gain that each model recovers, and its KL.

    python benchmarks/demo_seeds.py --out build/demo-seeds [--seeds 0 1 2]

Prints a row for every seed and model, and each model's mean. Finished seeds are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bonbon.demo import demo_config
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import run as run_stage

FIGURES = ("win_rate", "kl", "recovered", "kl_efficiency")


def measured(out: Path, seed: int) -> dict[str, Any]:
    folder = RunFolder(out / f"seed-{seed}", demo_config(seed=seed))
    results = folder.evaluation / "evaluation.json"
    if not results.exists():
        with folder.locked():
            run_stage.run(folder)
    models: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["models"]
    for figures in models.values():
        figures["gold"] = figures["win_rate_by"]["gold"]
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    runs = [measured(args.out, seed) for seed in args.seeds]
    names = [*FIGURES, "gold"]
    print(f"{'model':<16} {'seed':<6}" + "".join(f"{name:>15}" for name in names))
    for model in ("best-of-8", "sft_bon", "bonbon", "rank_regression"):
        columns = [[run[model][name]["value"] for run in runs] for name in names]
        for row, seed in enumerate(args.seeds):
            print(f"{model:<16} {seed:<6}" + "".join(f"{column[row]:15.3f}" for column in columns))
        means = "".join(f"{sum(column) / len(column):15.3f}" for column in columns)
        print(f"{model:<16} {'mean':<6}" + means)


if __name__ == "__main__":
    main()
