"""The work of a Ray worker on a shard: run the stage, and find the prompts that make it fail."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bonbon.cluster.attempts import DeadLetter, DeadLetters, Ledger, Mark, Try, reasons
from bonbon.config.run import RunConfig
from bonbon.groups.group import Group, Groups
from bonbon.groups.shards import shard_path, shard_rows
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import ShardWork
from bonbon.runs.work import opened_work
from bonbon.system.errors import BonbonError, UnavailableError
from bonbon.system.storage import is_there
from bonbon.system.user_functions import error_text

MAX_LONE_FAILURES = 5  # failures alone without one success: the prompts are not at fault
_ENGINES = frozenset({"torch", "vllm"})  # their exceptions may leave a process broken
_LONGEST_REASON = 1000  # characters

Row = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that the command sends its workers. `attempts` names the folder of tries."""

    path: Path
    config: RunConfig
    cwd: str
    attempts: str
    tries: int
    max_dead_letters: int
    set_aside: frozenset[tuple[str, str]]  # (stage, prompt id) of earlier runs

    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(self.path, self.config)


def attempts_folder(folder: RunFolder, name: str) -> Path:
    """Return the folder that records the tries of one start of a command."""
    return folder.data / ".bonbon" / "attempts" / name


class ShardWorker:
    """A Ray actor that runs `stage` on the shards whose numbers it is called with.

    The model is loaded at the first shard. An error there, or of the storage, is raised and ends
    the run.
    """

    def __init__(self, settings: WorkerSettings, stage: str) -> None:
        self._settings = settings
        self._stage = stage
        self._stack = ExitStack()
        self._processor: ShardProcessor | None = None

    def __call__(self, batch: Row) -> dict[str, np.ndarray]:
        """Process shards; return rows of shard, prompts, tokens and set_aside, with the counts."""
        done = [self._do(int(shard)) for shard in batch["shard"]]
        tokens = np.asarray([it.tokens for it in done]) + batch["tokens"]
        return {
            "shard": batch["shard"],
            "prompts": np.asarray([it.prompts for it in done]),
            "tokens": tokens if self._stage == "sample" else batch["tokens"],
            "set_aside": np.asarray([it.set_aside for it in done]) + batch["set_aside"],
        }

    def __del__(self) -> None:
        self._stack.close()

    def _do(self, shard: int) -> Done:
        if self._processor is None:
            self._processor = self._enter()
        return self._processor.do(shard)

    def _enter(self) -> ShardProcessor:
        """Check that this node can access the run's folder, and set up the stage."""
        settings = self._settings
        if os.path.isdir(settings.cwd):
            os.chdir(settings.cwd)
        folder = settings.folder()
        attempts = attempts_folder(folder, settings.attempts)
        if not is_there(attempts / "begun"):
            raise BonbonError(
                f"a worker on {socket.gethostname()} does not see {folder.data}; put it on a file "
                "system that all nodes share, or set `storage` to a place that all of them reach"
            )
        ledger = _ledger(attempts / self._stage)
        return ShardProcessor(settings, self._stage, folder, ledger, self._stack)


def _ledger(folder: Path) -> Ledger:
    """Return the ledger for this process, a Ray actor."""
    import ray

    context = ray.get_runtime_context()

    def alive(node: str) -> bool:
        return any(it["NodeID"] == node and it["Alive"] for it in ray.nodes())

    return Ledger(folder, context.get_node_id(), context.get_actor_id() or "driver", alive)


@dataclass(frozen=True)
class Done:
    """The counts of a finished shard."""

    prompts: int
    tokens: int = 0
    set_aside: int = 0


@dataclass
class ShardProcessor:
    """A stage in this process, which sets aside prompts that make it fail. See `bonbon.cluster`."""

    settings: WorkerSettings
    stage: str
    folder: RunFolder
    ledger: Ledger
    stack: ExitStack
    _work: ShardWork | None = None

    def do(self, shard: int) -> Done:
        """Process a shard, unless it exists already. Raises BonbonError for what ends the run."""
        stage = self.folder.stages[self.stage]
        source, target = stage.source, stage.output
        if is_there(shard_path(target, shard)):
            return Done(shard_rows(shard_path(source, shard)))
        work = self._opened()
        past = self.ledger.tries(shard)
        mark = self.ledger.begin(shard)  # before reading: the file itself may kill the process
        groups = work.read(shard)
        left = self._left(groups)
        made = None
        if self._suspect(shard, past):
            self.ledger.ended(mark)
        else:
            made = self._make(work, left, mark)
        if made is None:
            made = self._one_by_one(work, shard, left)
            self.ledger.begin(shard)
        work.write(shard, made)
        self.ledger.forget(shard)
        return Done(len(groups), int(made.provenance["tokens"]), len(groups) - len(made))

    def _opened(self) -> ShardWork:
        """Load the model, once. Raises BonbonError when loading keeps killing workers."""
        if self._work is None:
            lost = self.ledger.loads()
            if self.ledger.charged(lost, self.settings.tries) >= self.settings.tries:
                raise BonbonError(
                    f"a worker on {socket.gethostname()} died {len(lost)} times while it loaded "
                    f"its model to {self.stage}; the model may need more memory than there is"
                )
            self.ledger.begin_loading()
            self._work = self.stack.enter_context(opened_work(self.folder, self.stage))
            self.ledger.loaded()
        return self._work

    def _left(self, groups: Groups) -> Groups:
        """Drop the prompts that were set aside before this start of the command."""
        left = [it for it in groups if (self.stage, it.prompt_id) not in self.settings.set_aside]
        return Groups(left, groups.provenance)

    def _suspect(self, shard: int, past: Sequence[Try]) -> bool:
        """Return whether a shard must be tried prompt by prompt."""
        together = [it for it in past if it.prompt_id is None]
        charged = self.ledger.charged(together, self.settings.tries)
        if charged > self.settings.tries:
            raise BonbonError(
                f"workers died {len(together)} times at shard {shard} while they read or wrote it; "
                f"look at Ray's logs, and whether {self.folder.data} is in order"
            )
        return charged > 0 or len(together) < len(past)

    def _make(self, work: ShardWork, groups: Groups, mark: Mark) -> Groups | None:
        """Run the stage on the groups; None, with the reason recorded, where it fails."""
        try:
            return work.make(groups)
        except UnavailableError:
            raise
        except (Exception, SystemExit) as error:
            self.ledger.failed(mark, _reason(error))
            if _may_have_broken(error):
                os._exit(1)  # Ray starts another worker in its place
            return None

    def _one_by_one(self, work: ShardWork, shard: int, groups: Groups) -> Groups:
        """Process the prompts one by one; set aside those that fail, return the others."""
        kept = self.ledger.kept(shard)
        while (number := self._next(shard, groups, kept)) is not None:
            mark = self.ledger.begin(shard, groups[number].prompt_id)
            made = self._make(work, groups[number : number + 1], mark)
            if made is not None:
                self.ledger.keep(shard, number, made)
                self.ledger.ended(mark)
                kept[number] = made
        failed = self._failures(shard)
        for number, group in enumerate(groups):
            if number not in kept:
                self._set_aside(shard, group, failed[group.prompt_id])
        return _merged(work, groups, kept)

    def _next(self, shard: int, groups: Groups, kept: Mapping[int, Groups]) -> int | None:
        """Return the prompt to try next, with the fewest failures; None when all are done."""
        failed = self._failures(shard)
        counts = {
            number: self.ledger.charged(failed.get(group.prompt_id, []), self.settings.tries)
            for number, group in enumerate(groups)
            if number not in kept
        }
        limit = min(MAX_LONE_FAILURES, max(2, len(groups)))  # a single prompt can be at fault
        if not kept and sum(count > 0 for count in counts.values()) >= limit:
            raise BonbonError(
                f"{limit} prompts of shard {shard} could not be {self.stage}d, each alone, and "
                f"none could: {reasons(it for tries in failed.values() for it in tries)}; that is "
                "no single prompt's fault, so none is set aside; the same command resumes"
            )
        # The try of the whole shard was the first try of each prompt.
        left = [
            number for number, count in counts.items() if count < max(1, self.settings.tries - 1)
        ]
        return min(left, key=lambda number: (counts[number], number), default=None)

    def _failures(self, shard: int) -> dict[str, list[Try]]:
        """Return the failed tries of single prompts of a shard, by prompt."""
        failed: dict[str, list[Try]] = {}
        for attempt in self.ledger.tries(shard):
            if attempt.prompt_id is not None:
                failed.setdefault(attempt.prompt_id, []).append(attempt)
        return failed

    def _set_aside(self, shard: int, group: Group, failed: Sequence[Try]) -> None:
        letters = DeadLetters(self.folder.data)
        stages = ("sample", "score") if self.stage == "sample" else ("score",)
        paths = [shard_path(self.folder.stages[it].output, shard) for it in stages]
        names = [path.relative_to(self.folder.data).as_posix() for path in paths]
        reason = reasons(failed)
        tries = len(failed) + 1
        letters.add(DeadLetter(self.stage, group.prompt_id, group.prompt, reason, tries, names))
        count = len(letters.read())
        if count > self.settings.max_dead_letters:
            raise BonbonError(
                f"{count} prompts were set aside, more than engine.max_dead_letters = "
                f"{self.settings.max_dead_letters}, the last because: {reason}; see "
                f"{letters.path}, and fix the cause or raise the limit"
            )


def _merged(work: ShardWork, groups: Groups, kept: Mapping[int, Groups]) -> Groups:
    """Join results made prompt by prompt, as if the shard had been processed at once."""
    parts = [kept[number] for number in sorted(kept)]
    provenance = work.make(Groups([], groups.provenance)).provenance
    for name in ("tokens", "seconds"):
        provenance[name] = sum(part.provenance[name] for part in parts)
    return Groups([group for part in parts for group in part], provenance)


def _reason(error: BaseException) -> str:
    if isinstance(error, BonbonError):
        return str(error)
    message = (
        error_text(error) if isinstance(error, Exception) else f"the stage's code exited ({error})"
    )
    return " ".join(message.split())[:_LONGEST_REASON]


def _may_have_broken(error: BaseException) -> bool:
    """Return whether this error may make later calls in this process fail."""
    if not isinstance(error, BonbonError):
        return True
    cause: BaseException | None = error
    while cause is not None and type(cause).__module__.split(".")[0] not in _ENGINES:
        cause = cause.__cause__
    return cause is not None
