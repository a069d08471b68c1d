"""Tasks of lm-evaluation-harness, which measure the effect of an alignment on other abilities.

The harness is an extra (`bonbon-align[lm-eval]`) and is imported when a run starts. Its numbers are
those of its own command with the same tasks: greedy or likelihood-based as each task defines,
prompts as the task writes them, no chat template. Two things differ: log-probabilities are computed
in float32 for all dtypes of weights, and standard errors without a closed form come from 1,000
bootstrap resamples instead of 100,000.
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from numbers import Real
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.evaluation import LMEvalConfig
from bonbon.system.errors import BonbonError
from bonbon.system.progress import progress_bar
from bonbon.system.user_functions import error_text

# The harness's defaults, so that the few-shot examples are those of its own command.
_RANDOM_SEED, _OTHER_SEED = 0, 1234
_BOOTSTRAP = 1_000
_LOGGERS = ("lm_eval", "datasets", "evaluate", "transformers")


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    Attributes:
        metric: the harness's name, followed by a comma and its filter unless that is `none`.
        value: NaN or an infinity if the harness computed that.
        standard_error: of `value`; None where the harness has none (one example, some metrics).
        higher_is_better: None where the task does not define it.
        n: the number of examples that were run; None where the harness does not report it.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    n: int | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a NaN or an infinity, which JSON lacks, as text."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return asdict(self) | {"value": value}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TaskResult:
        """Read the result that `to_json` wrote."""
        return cls(**{**record, "value": float(record["value"])})


@dataclass(frozen=True)
class TaskChange:
    """The change of one metric of one task; `change` is after − before.

    `low` and `high` are the 95% interval of `change`; None where a standard error is missing.
    """

    task: str
    metric: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    higher_is_better: bool | None


def task_changes(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> list[TaskChange]:
    """Compute after − before of every metric, in the order of `after`, with 95% intervals.

    The intervals are normal, with the sum of both variances, as if the models had seen different
    examples. They saw the same ones, and mostly fail on the same ones, so the intervals are wider
    than paired ones would be: conservative. An accuracy of 0 or 1 has a standard error of 0 and
    adds nothing to an interval, however few its examples are.

    Raises ValueError when the two are not of the same metrics and numbers of examples.
    """
    earlier = {(result.task, result.metric, result.n): result for result in before}
    keys = [(result.task, result.metric, result.n) for result in after]
    if len(keys) != len(before) or earlier.keys() != set(keys):
        raise ValueError("task results before and after are not of the same tasks and examples")
    return [_change(earlier[key], result) for key, result in zip(keys, after, strict=True)]


def _change(before: TaskResult, after: TaskResult) -> TaskChange:
    change = after.value - before.value
    low = high = None
    if before.standard_error is not None and after.standard_error is not None:
        error = math.hypot(before.standard_error, after.standard_error)
        half = NormalDist().inv_cdf(0.975) * error
        low, high = change - half, change + half
    return TaskChange(
        task=after.task,
        metric=after.metric,
        before=before.value,
        after=after.value,
        change=change,
        low=low,
        high=high,
        higher_is_better=after.higher_is_better,
    )


# --- running --------------------------------------------------------------------------------------


def run_tasks(
    config: LMEvalConfig, model: PreTrainedModel, tokenizer: Tokenizer
) -> list[TaskResult]:
    """Measure all metrics of the tasks on a loaded model; a group adds its members' metrics.

    Tasks, groups and tags are looked up in `config.include_path` first, then in the harness. A
    task's data files with relative paths are read from the current folder. `num_fewshot` does not
    change a task that fixes 0 examples. Seeds are fixed, and the model, the tokenizer, the random
    states, loggers and environment are restored.

    Raises BonbonError when the harness is not installed, when a task is unknown, cannot be loaded
    or fails, and when two of the names contain the same task.
    """
    results: list[TaskResult] = []
    with _restored(model):
        wrapper, evaluate = _lm_eval("models.huggingface").HFLM, _lm_eval("evaluator").evaluate
        with progress_bar("lm_eval tasks", len(set(config.tasks)), "tasks") as bar, _quiet():
            tasks = _load_tasks(config)
            wrapped = wrapper(
                pretrained=model,
                tokenizer=deepcopy(tokenizer),  # the harness may set its padding token
                backend="causal",
                batch_size=config.batch_size,
                softmax_dtype="float32",  # in 16 bits answers would tie
            )
            for name, loaded in tasks.items():
                results += _evaluate(evaluate, wrapped, name, loaded, config.limit)
                bar.advance(1)
    return results


def _lm_eval(module: str) -> Any:
    """Import a module of lm-evaluation-harness."""
    try:
        return import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise BonbonError(
            "lm_eval tasks need lm-evaluation-harness: pip install 'bonbon-align[lm-eval]'"
        ) from error


def _evaluate(
    evaluate: Any, wrapped: Any, name: str, loaded: Any, limit: int | None
) -> list[TaskResult]:
    # Not simple_evaluate, which also calls git and pip and asks the hub about the model.
    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    try:
        results = evaluate(
            wrapped, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
        )
    except Exception as error:  # a task may run any code
        raise BonbonError(f"the lm_eval task {name!r} failed: {error_text(error)}") from error
    return list(_results(results))


def _results(results: Mapping[str, Any]) -> Iterator[TaskResult]:
    """Yield the metrics that are single numbers, from the harness's `{"acc,none": 0.5, ...}`."""
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = row.get(f"{metric}_stderr,{kind}")  # "N/A" where there is none
            counts = row.get("sample_count", {})  # of a group
            yield TaskResult(
                task=task,
                metric=metric if kind == "none" else key,
                value=float(value),
                standard_error=float(error)
                if isinstance(error, Real) and math.isfinite(error)
                else None,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                n=counts.get(key, row.get("sample_len")),
            )


# --- loading tasks --------------------------------------------------------------------------------


def _load_tasks(config: LMEvalConfig) -> dict[str, Any]:
    """Load tasks by name, each as {"tasks": ..., "groups": ..., "group_map": ...}."""
    manager = _task_manager(config)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise BonbonError(
                f"lm-evaluation-harness has no task {name!r} (`lm-eval ls tasks` lists its own); "
                f"set include_path to the folder with the task's YAML file{_own(config)}"
            )
    tasks = {name: _load_task(manager, name) for name in config.tasks}
    homes: dict[str, str] = {}
    for name, loaded in tasks.items():
        for task_name, task in loaded["tasks"].items():
            if homes.setdefault(task_name, name) != name:
                raise BonbonError(
                    f"the lm_eval task {task_name!r} is in both {homes[task_name]!r} and {name!r}; "
                    "name one of them"
                )
            _set_shots(task, config.num_fewshot)
    return tasks


def _own(config: LMEvalConfig) -> str:
    return f" ({config.include_path} has none that can be read)" if config.include_path else ""


def _task_manager(config: LMEvalConfig) -> Any:
    """Return the index of all tasks, or only of the user's where no others are asked for.

    Reading the harness's own 14,000 takes about ten seconds. A group or a tag of the user's may
    have members among them.
    """
    if config.include_path is None:
        return _built_in_tasks()
    if not config.include_path.is_dir():
        raise BonbonError(f"include_path {config.include_path}: there is no such folder")
    tasks = _lm_eval("tasks")
    own = tasks.TaskManager(include_path=config.include_path, include_defaults=False)
    if set(config.tasks) <= set(own.all_subtasks):
        return own
    return tasks.TaskManager(include_path=config.include_path)


@lru_cache(maxsize=1)
def _built_in_tasks() -> Any:
    return _lm_eval("tasks").TaskManager()


def _load_task(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # a task may load its data by any code
        raise BonbonError(
            f"the lm_eval task {name!r} cannot be loaded: {error_text(error)}; check its YAML "
            "file, and that its data are in local files, on a hub that can be reached, or in the "
            "cache of an earlier run"
        ) from error


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """Set the few-shot examples as the harness's command does: 0 by default; a task's 0 stays."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


# --- restoring the process ------------------------------------------------------------------------


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore the random states, the environment and the model's mode."""
    training, environment = model.training, dict(os.environ)
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if model.device.type == "cpu" else [model.device]
    os.environ["DISABLE_MULTIPROC"] = "1"  # else a bootstrap would fork the process with the model
    try:
        with torch.random.fork_rng(devices, device_type=model.device.type):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(state)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        model.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log only errors, print nothing, and show no progress bar but ours."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch off tqdm, which reads its environment variable only at import."""
    tqdm = import_module("tqdm.std").tqdm
    own, begin = vars(tqdm)["__init__"], tqdm.__init__

    def begin_disabled(bar: Any, *args: Any, **options: Any) -> None:
        begin(bar, *args, **(options | {"disable": True}))

    tqdm.__init__ = begin_disabled
    try:
        yield
    finally:
        tqdm.__init__ = own
