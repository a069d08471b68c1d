"""The Ray Data pipeline, from shard numbers to groups, that the command runs."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

from bonbon.cluster.attempts import DeadLetters
from bonbon.cluster.session import check_room, cluster, pools_of, watched_head
from bonbon.cluster.workers import ShardWorker, WorkerSettings, attempts_folder
from bonbon.config.engine import PoolConfig, RayEngineConfig
from bonbon.groups.shards import shard_indices
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import prompt_count
from bonbon.system.atomic_files import write_json
from bonbon.system.errors import BonbonError, first_line
from bonbon.system.progress import Bar, progress_bar
from bonbon.system.storage import is_remote, remove_folder


def work_on_cluster(folder: RunFolder, stages: Sequence[str], engine: RayEngineConfig) -> None:
    """Run `sample`, `score` or both, in this order, on Ray's workers; see `bonbon.cluster`.

    Prints how many prompts are set aside, by earlier starts too. Raises BonbonError when Ray is not
    installed, the cluster cannot be reached or is too small, a model cannot be loaded, the storage
    cannot be written, or more prompts fail than `engine.max_dead_letters`.
    """
    folder = _absolute(folder)
    letters = DeadLetters(folder.data)
    with _at_end(letters.gather):
        if stages and (todo := _todo(folder, stages)):
            _work(folder, stages, engine, todo)
    if known := letters.read():
        verb = "prompt was" if len(known) == 1 else "prompts were"
        print(f"bonbon: {len(known)} {verb} set aside; see {letters.path}", file=sys.stderr)


def _absolute(folder: RunFolder) -> RunFolder:
    """Return the run's folder with absolute paths, which hold in another process."""
    config = folder.config
    if config.storage is not None and not is_remote(folder.data):
        storage = {"storage": str(folder.data.absolute())}
        config = config.model_copy(update=storage)
    return RunFolder(folder.path.absolute(), config)


def _todo(folder: RunFolder, stages: Sequence[str]) -> list[int]:
    """Return the shards that the first stage can read and that some stage has yet to write."""
    done = [set(shard_indices(folder.stages[stage].output)) for stage in stages]
    finished = set.intersection(*done)
    return [i for i in shard_indices(folder.stages[stages[0]].source) if i not in finished]


def _work(
    folder: RunFolder, stages: Sequence[str], engine: RayEngineConfig, todo: Sequence[int]
) -> None:
    pools = pools_of(engine, list(stages))
    title = " and ".join({"sample": "sampling", "score": "scoring"}[stage] for stage in stages)
    with (
        cluster(engine.address) as ray,
        progress_bar(title, 0, "prompts") as bar,
        _worker_settings(folder, engine) as settings,
    ):
        check_room(ray, pools)
        bar.set(0, prompt_count(folder.stages[stages[0]].source, todo))
        try:
            with _quiet_context(ray), watched_head(ray):
                _watch(
                    _rows(ray, settings, dict(zip(stages, pools.values(), strict=True)), todo), bar
                )
        except Exception as error:
            raise _as_bonbon_error(ray, error) from error


@contextmanager
def _worker_settings(folder: RunFolder, engine: RayEngineConfig) -> Iterator[WorkerSettings]:
    """Make the workers' settings; the records of tries are removed before and after."""
    name = uuid.uuid4().hex[:8]
    attempts = attempts_folder(folder, name)
    # A store has no locks, so another command may have its own records there.
    own = attempts if is_remote(folder.data) else attempts.parent
    remove_folder(own)
    write_json(attempts / "begun", {"by": os.getpid()})
    letters = DeadLetters(folder.data)
    letters.drop_unwritten()
    set_aside = frozenset(letter.key for letter in letters.read())
    with _at_end(partial(remove_folder, own)):
        yield WorkerSettings(
            path=folder.path,
            config=folder.config,
            cwd=os.getcwd(),
            attempts=name,
            tries=engine.tries,
            max_dead_letters=engine.max_dead_letters,
            set_aside=set_aside,
        )


@contextmanager
def _at_end(last: Callable[[], object]) -> Iterator[None]:
    """Call `last` at the end; where both fail, raise the first error."""
    try:
        yield
    except BaseException:
        with suppress(BonbonError):
            last()
        raise
    last()


# --- Ray Data -------------------------------------------------------------------------------------


@contextmanager
def _quiet_context(ray: ModuleType) -> Iterator[None]:
    """Set Ray Data up for shards that take long and rows of almost no bytes."""
    from bonbon.cluster.backpressure import POLICIES, policies

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard can take half an hour
    context.raise_original_map_exception = True  # else a worker's message is lost
    # A worker has one shard at a time, so a pool is fully used at 1; the default, 1.75, is for two.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.set_config(POLICIES, policies())
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # errors are raised as well
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _rows(
    ray: ModuleType, settings: WorkerSettings, pools: dict[str, PoolConfig], todo: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shard that has passed all stages."""
    numbers = [{"shard": i, "prompts": 0, "tokens": 0, "set_aside": 0} for i in todo]
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers))
    for stage, pool in pools.items():
        data = data.map_batches(
            ShardWorker,
            fn_constructor_kwargs={"settings": settings, "stage": stage},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.min, len(todo)),
                max_size=min(pool.max, len(todo)),
                max_tasks_in_flight_per_actor=1,
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
    rows: Iterator[dict[str, Any]] = data.iter_rows()
    return rows


def _watch(rows: Iterator[dict[str, Any]], bar: Bar) -> None:
    set_aside = 0
    for row in rows:
        bar.advance(int(row["prompts"]))
        if row["tokens"]:
            bar.tokens(int(row["tokens"]))
        set_aside += int(row["set_aside"])
        if set_aside:
            bar.note(f"{set_aside} set aside")


def _as_bonbon_error(ray: ModuleType, error: BaseException) -> BonbonError:
    """Return the BonbonError that a worker raised, or one with Ray's message."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's wrapper of a task's error has the class of that error too.
        if isinstance(cause, BonbonError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return BonbonError(
        f"Ray stopped: {type(error).__name__}: {first_line(error)}; finished shards are "
        "kept, and the same command resumes"
    )
