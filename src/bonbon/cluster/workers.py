"""What a worker does with a shard: the stage's own code, and what to do when that fails."""

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
from bonbon.system.user_functions import said

HOPELESS = 5  # so many prompts of a shard that fail alone, and none that does not: not their fault
_ENGINES = frozenset({"torch", "vllm"})  # whose exceptions may leave a process broken
_LONGEST_REASON = 1000  # characters

Row = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """What the command tells its workers. `attempts` is a folder with the file `begun`."""

    path: Path
    config: RunConfig
    cwd: str
    attempts: str
    tries: int
    max_dead_letters: int
    set_aside: frozenset[tuple[str, str]]  # (stage, prompt id) of earlier runs

    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.path, self.config)


def attempts_folder(folder: RunFolder, name: str) -> Path:
    """Where the tries of one start of a command are noted."""
    return folder.data / ".bonbon" / "attempts" / name


class ShardWorker:
    """One of Ray's actors: it does `stage` for the shards whose numbers it is called with.

    The model is loaded at the first shard. What fails there, or with the storage, is raised and
    ends the run.
    """

    def __init__(self, job: Job, stage: str) -> None:
        self._job = job
        self._stage = stage
        self._stack = ExitStack()
        self._shop: Workshop | None = None

    def __call__(self, batch: Row) -> dict[str, np.ndarray]:
        """Rows of shard, prompts, tokens and set_aside, with this stage's counts."""
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
        if self._shop is None:
            self._shop = self._enter()
        return self._shop.do(shard)

    def _enter(self) -> Workshop:
        """Look whether the run's folder can be seen from here."""
        job = self._job
        if os.path.isdir(job.cwd):
            os.chdir(job.cwd)
        folder = job.folder()
        attempts = attempts_folder(folder, job.attempts)
        if not is_there(attempts / "begun"):
            raise BonbonError(
                f"a worker on {socket.gethostname()} does not see {folder.data}; put it on a file "
                "system that all nodes share, or set `storage` to a place that all of them reach"
            )
        ledger = _ledger(attempts / self._stage)
        return Workshop(job, self._stage, folder, ledger, self._stack)


def _ledger(folder: Path) -> Ledger:
    """The ledger for this process, one of Ray's actors."""
    import ray

    context = ray.get_runtime_context()

    def alive(node: str) -> bool:
        return any(it["NodeID"] == node and it["Alive"] for it in ray.nodes())

    return Ledger(folder, context.get_node_id(), context.get_actor_id() or "driver", alive)


@dataclass(frozen=True)
class Done:
    """What became of a shard."""

    prompts: int
    tokens: int = 0
    set_aside: int = 0


@dataclass
class Workshop:
    """A stage's work in this process, with the blame for what fails. See `bonbon.cluster`."""

    job: Job
    stage: str
    folder: RunFolder
    ledger: Ledger
    stack: ExitStack
    _work: ShardWork | None = None

    def do(self, shard: int) -> Done:
        """Make a shard, unless it is there. Raises BonbonError for what ends the run."""
        source, target = self.folder.ways(self.stage)
        if is_there(shard_path(target, shard)):
            return Done(shard_rows(shard_path(source, shard)))
        work = self._opened()
        past = self.ledger.tries(shard)
        mark = self.ledger.begin(shard)  # before it is read: what kills may be in the file
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
        """The work, with its model loaded once. Raises BonbonError when loading kills workers."""
        if self._work is None:
            lost = self.ledger.loads()
            if self.ledger.charged(lost, self.job.tries) >= self.job.tries:
                raise BonbonError(
                    f"a worker on {socket.gethostname()} died {len(lost)} times while it loaded "
                    f"what it {self.stage}s with; that may need more memory than there is"
                )
            self.ledger.begin_loading()
            self._work = self.stack.enter_context(opened_work(self.folder, self.stage))
            self.ledger.loaded()
        return self._work

    def _left(self, groups: Groups) -> Groups:
        """The groups without the prompts that were set aside before this start of the command."""
        left = [it for it in groups if (self.stage, it.prompt_id) not in self.job.set_aside]
        return Groups(left, groups.provenance)

    def _suspect(self, shard: int, past: Sequence[Try]) -> bool:
        """Whether a shard must be tried prompt by prompt."""
        together = [it for it in past if it.prompt_id is None]
        charged = self.ledger.charged(together, self.job.tries)
        if charged > self.job.tries:
            raise BonbonError(
                f"workers died {len(together)} times at shard {shard} while they read or wrote it; "
                f"look at Ray's logs, and whether {self.folder.data} is in order"
            )
        return charged > 0 or len(together) < len(past)

    def _make(self, work: ShardWork, groups: Groups, mark: Mark) -> Groups | None:
        """What the stage makes of the groups; None, with the reason noted, where it fails."""
        try:
            return work.make(groups)
        except UnavailableError:
            raise
        except (Exception, SystemExit) as error:
            self.ledger.failed(mark, _reason(error))
            if _may_have_broken(error):
                os._exit(1)  # Ray starts a worker in this one's place
            return None

    def _one_by_one(self, work: ShardWork, shard: int, groups: Groups) -> Groups:
        """The groups that can be made; the others are set aside."""
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
        """The prompt to try next, the one with the fewest failures; None when all are done."""
        failed = self._failures(shard)
        counts = {
            number: self.ledger.charged(failed.get(group.prompt_id, []), self.job.tries)
            for number, group in enumerate(groups)
            if number not in kept
        }
        hopeless = min(HOPELESS, max(2, len(groups)))  # one prompt alone may well be at fault
        if not kept and sum(count > 0 for count in counts.values()) >= hopeless:
            raise BonbonError(
                f"{hopeless} prompts of shard {shard} could not be {self.stage}d, each alone, and "
                f"none could: {reasons(it for tries in failed.values() for it in tries)}; that is "
                "no single prompt's fault, so none is set aside; the same command goes on"
            )
        # The try of the whole shard was each prompt's first.
        left = [number for number, count in counts.items() if count < max(1, self.job.tries - 1)]
        return min(left, key=lambda number: (counts[number], number), default=None)

    def _failures(self, shard: int) -> dict[str, list[Try]]:
        """The failed tries of a shard's prompts, each alone."""
        found: dict[str, list[Try]] = {}
        for attempt in self.ledger.tries(shard):
            if attempt.prompt_id is not None:
                found.setdefault(attempt.prompt_id, []).append(attempt)
        return found

    def _set_aside(self, shard: int, group: Group, failed: Sequence[Try]) -> None:
        letters = DeadLetters(self.folder.data)
        stages = ("sample", "score") if self.stage == "sample" else ("score",)
        names = [
            shard_path(self.folder.ways(it)[1], shard).relative_to(self.folder.data).as_posix()
            for it in stages
        ]
        reason = reasons(failed)
        tries = len(failed) + 1
        letters.add(DeadLetter(self.stage, group.prompt_id, group.prompt, reason, tries, names))
        count = len(letters.read())
        if count > self.job.max_dead_letters:
            raise BonbonError(
                f"{count} prompts were set aside, more than engine.max_dead_letters = "
                f"{self.job.max_dead_letters}, the last because: {reason}; see {letters.path}, "
                "and put right what fails or raise the limit"
            )


def _merged(work: ShardWork, groups: Groups, kept: Mapping[int, Groups]) -> Groups:
    """What was made prompt by prompt, as if it had been made at once."""
    parts = [kept[number] for number in sorted(kept)]
    provenance = work.make(Groups([], groups.provenance)).provenance
    for name in ("tokens", "seconds"):
        provenance[name] = sum(part.provenance[name] for part in parts)
    return Groups([group for part in parts for group in part], provenance)


def _reason(error: BaseException) -> str:
    if isinstance(error, BonbonError):
        return str(error)
    told = said(error) if isinstance(error, Exception) else f"the stage's code exited ({error})"
    return " ".join(told.split())[:_LONGEST_REASON]


def _may_have_broken(error: BaseException) -> bool:
    """Whether later calls in this process may fail because of this failure."""
    if not isinstance(error, BonbonError):
        return True
    cause: BaseException | None = error
    while cause is not None and type(cause).__module__.split(".")[0] not in _ENGINES:
        cause = cause.__cause__
    return cause is not None
