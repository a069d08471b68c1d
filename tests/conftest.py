"""What the tests share: real data where it is there, tiny models built on the spot, and groups."""

from __future__ import annotations

import os

from support.groups import MakeGroup, group_of
from support.models import (
    build_tiny_model,
    build_tiny_reward_model,
)
from support.paths import REPO

# Before anything imports transformers or datasets.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL_FIXTURES = {"stories260k", "tiny_model", "tiny_reward_model"}
# Marks of whole files and folders; tests elsewhere are marked by their fixtures and calls.
MARKS = {
    "model": (
        "cluster", "decoding/test_choosers.py", "decoding/test_stepwise.py", "demo", "end_to_end",
        "evaluation/test_human_text.py", "evaluation/test_kl.py", "evaluation/test_lm_eval.py",
        "models", "objectives/test_tabular.py", "rewards", "runs/test_storage.py", "sampling",
        "serve/test_serve_local.py", "stages", "training",
    ),
    "process": ("cluster", "training/test_distributed.py", "end_to_end/test_resume.py"),
    "server": (
        "evaluation/test_judge.py", "rewards/test_openai_reward.py", "runs/test_storage.py",
        "sampling/test_openai_sampler.py", "serve",
    ),
    "browser": ("report/test_report_browser.py",),
    # Importing the trainer, or drawing whole pages, takes longer than their tests.
    "slow": (
        "evaluation/test_evaluator.py", "objectives/test_selection.py", "report/test_report.py",
        "runs/test_shard_work.py",
    ),
}  # fmt: skip


def _marks_of_place(path: Path) -> set[str]:
    """Return the marks of a whole file."""
    place = path.relative_to(Path(__file__).parent).as_posix()
    return {mark for mark, places in MARKS.items() if place.startswith(places)}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import files that `-m "not (model or …)"` leaves out: it takes a while."""
    left_out = re.fullmatch(r"not \(([\w ]+)\)", config.option.markexpr or "")
    if left_out is None or collection_path.suffix != ".py":
        return None
    return True if _marks_of_place(collection_path) & set(left_out[1].split(" or ")) else None


def _marks_of(item: pytest.Item) -> set[str]:
    marks = _marks_of_place(item.path)
    if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
        marks.add("model")
    if "subprocess" in item.function.__code__.co_names:  # type: ignore[attr-defined]
        marks.add("process")
    return marks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and put the longest files first, so that no worker is left with one."""
    longest = ("test_resume.py", "test_pipeline.py")
    items.sort(key=lambda item: item.path.name not in longest)
    for item in items:
        for mark in _marks_of(item):
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _clean_logging() -> Iterator[None]:
    """Each test leaves the root logger as it found it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


# --- real data ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data; it is not part of the repository."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the shared data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A pretrained model of 260,032 parameters that writes children's stories."""
    folder = shared / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the model is not at {folder}")
    return folder


# --- tiny models ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama: 259 byte-level tokens, context 64."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random reward model over the same tokenizer."""
    return build_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny-reward")


# --- groups ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_group() -> MakeGroup:
    """`make_group(prompt_id, prompt, completions, rewards=..., ...)`."""
    return group_of
