"""Time to write a report and to open it in Chromium.

    python benchmarks/report.py [prompts] [models]

Generates a run of 2,000 prompts with 8 completions of about 500 characters from each of 2 models
and the base model (and 8 more for best-of-8), writes its report, and opens it several times in
headless Chromium (needs selenium, chromium and chromedriver). Prints the file's size and medians.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.demo import PROMPTS
from bonbon.groups.group import Group
from bonbon.groups.shards import shard_path, write_shard
from bonbon.report import write_report

N, K = 8, 8
WORDS = 95  # about 500 characters
RUNS = 5
_SHOWN = "return document.getElementById('count').textContent.startsWith('showing')"
_TIMES = """
const nav = performance.getEntriesByType('navigation')[0];
const paint = performance.getEntriesByName('first-contentful-paint')[0];
return [nav.domContentLoadedEventEnd, paint ? paint.startTime : NaN, window.shownAt];
"""
_WATCH = """
document.addEventListener('DOMContentLoaded', () => {
  const count = document.getElementById('count');
  new MutationObserver(() => {
    if (count.textContent.startsWith('showing')) window.shownAt ??= performance.now();
  }).observe(count, {childList: true});
});
"""


def main() -> None:
    prompts = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    models = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, prompts, [f"model-{i}" for i in range(models)])
        began = time.perf_counter()
        path = write_report(folder)
        print(f"written in            {time.perf_counter() - began:7.2f} s")
        print(f"size                  {path.stat().st_size / 1e6:7.1f} MB")
        for label, values in zip(
            ("DOMContentLoaded", "first paint", "completions shown"), opened(path), strict=True
        ):
            print(f"{label:<21} {statistics.median(values):7.0f} ms (median of {RUNS})")


def make_run(folder: Path, prompts: int, models: Sequence[str]) -> None:
    """Write a run's folder with generated completions and figures."""
    rng = np.random.default_rng(0)
    words = np.array(PROMPTS.read_text(encoding="utf-8").replace('"', " ").split())
    for name, draws in {"base": K + N, **dict.fromkeys(models, K)}.items():
        for start in range(0, prompts, 64):
            ids = range(start, min(start + 64, prompts))
            groups = [_group(rng, words, i, draws) for i in ids]
            write_shard(shard_path(folder / "evaluation" / name, start // 64), groups, {})
    names = ["base", f"best-of-{N}", *models]
    evaluation = {
        "schema_version": 2,
        "n": N,
        "k": K,
        "prompts": prompts,
        "base_model": "base",
        "main": models[-1],
        "models": {name: _figures(i) for i, name in enumerate(names)},
    }
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))


def _group(rng: np.random.Generator, words: Any, number: int, draws: int) -> Group:
    texts = [_text(rng, words, WORDS) for _ in range(draws)]
    return Group(
        prompt_id=f"prompt-{number:05d}",
        prompt=_text(rng, words, 30),
        prompt_token_ids=tuple(range(40)),
        completions=tuple(texts),
        token_ids=tuple(tuple(map(int, rng.integers(0, 32000, 120))) for _ in texts),
        logprobs=(-100.0,) * draws,
        finish_reasons=("stop",) * draws,
        rewards=tuple(map(float, rng.normal(size=draws))),
        metrics={"gold": tuple(map(float, rng.normal(size=draws)))},
    )


def _text(rng: np.random.Generator, words: Any, count: int) -> str:
    return " ".join(words[rng.integers(0, len(words), count)])


def _figures(index: int) -> dict[str, Any]:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    keys = ("kl", "recovered", "kl_efficiency", "length", "length_change", "tokens_per_answer")
    return {"win_rate": figure(0.5 + index / 10), **{key: figure(index / 3) for key in keys}}


def opened(path: Path) -> list[list[float]]:
    """Measure DOMContentLoaded, first paint and first completions shown, in ms, by run."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        watch = {"source": _WATCH}
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", watch)
        runs = [_open(driver, path) for _ in range(RUNS)]
        return [list(values) for values in zip(*runs, strict=True)]
    finally:
        driver.quit()


def _open(driver: Any, path: Path) -> list[float]:
    driver.get(path.as_uri())
    while not driver.execute_script(_SHOWN):
        time.sleep(0.02)
    return list(driver.execute_script(_TIMES))


if __name__ == "__main__":
    main()
