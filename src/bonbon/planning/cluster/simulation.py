"""A discrete-event simulation of the pipeline as a line of two stages.

A sampler takes a shard of prompts and draws its completions; a scorer scores it. A bounded number
of shards waits between them; a sampler that finds no free place keeps its shard and draws nothing
until there is one. Reading and writing take no time, and the pools have their full size from the
start.

The simulation is a loop over a heap. simpy (4.1) gives the same to the last bit, which a test
checks, but takes twice as long, and is one more dependency for the same amount of code.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bonbon.planning.cluster.workload import Floats
from bonbon.system.errors import BonbonError

_MOST_LIFETIMES = 5.0  # the longest shard, in mean times between failures: e^5 tries


@dataclass(frozen=True)
class Pool:
    """The replicas of a stage: the nodes of each, seconds to start, seconds of each shard."""

    nodes: tuple[tuple[int, ...], ...]
    startup: float
    seconds: Floats


@dataclass(frozen=True)
class Failures:
    """Random failures of nodes, `mtbf` seconds apart on average, each repaired after `repair`."""

    mtbf: float
    repair: float
    seed: int = 0


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation. `scored_at`: seconds, (shards,).

    Busy and blocked are fractions of replicas · seconds. Samplers are `blocked` while they hold a
    shard that finds no free place. Busy includes work that a failure undid.
    """

    seconds: float
    scored_at: Floats
    sampler_busy: float
    sampler_blocked: float
    scorer_busy: float
    most_waiting: int
    failures: int
    redone: int


_SAMPLE, _SCORE, _FAIL = 0, 1, 2


class _Line:
    """The state of the line; stage 0 samples and stage 1 scores.

    A replica is down (starting), in `free`, in `work`, or holds a sampled shard in `held`. `life`
    counts its failures: an event from before the last one is ignored.
    """

    def __init__(self, pools: tuple[Pool, Pool], places: int, failures: Failures | None) -> None:
        shards = len(pools[0].seconds)
        self.pools, self.places, self.failing = pools, places, failures
        self.rng = np.random.default_rng(failures.seed if failures else 0)
        self.seconds = tuple(pool.seconds.tolist() for pool in pools)
        self.waiting: tuple[deque[int], deque[int]] = (deque(range(shards)), deque())
        self.free: tuple[deque[int], deque[int]] = (deque(), deque())
        self.work: tuple[dict[int, tuple[int, float]], ...] = ({}, {})  # replica: shard, since
        self.held: dict[int, tuple[int, float]] = {}
        self.life = tuple([0] * len(pool.nodes) for pool in pools)
        self.events: list[tuple[float, int, int, int, int]] = []
        self.now, self.serial = 0.0, 0
        self.busy, self.blocked = [0.0, 0.0], 0.0
        self.scored_at, self.left = [math.nan] * shards, shards
        self.most_waiting = self.failed = self.redone = 0

    def run(self) -> None:
        for stage, pool in enumerate(self.pools):
            for replica in range(len(pool.nodes)):
                self._at(self.now + pool.startup, stage, replica)
        if self.failing:
            for node in sorted({n for pool in self.pools for nodes in pool.nodes for n in nodes}):
                self._at(self._next_failure(), _FAIL, node)
        while self.left:
            self.now, _, stage, which, life = heapq.heappop(self.events)
            if stage == _FAIL:
                self._fail(which)
            elif life == self.life[stage][which]:
                self._advance(stage, which)
            self._flow()

    def _at(self, time: float, stage: int, which: int) -> None:
        life = 0 if stage == _FAIL else self.life[stage][which]
        self.serial += 1  # events at the same time happen in the order they were made
        heapq.heappush(self.events, (time, self.serial, stage, which, life))

    def _advance(self, stage: int, replica: int) -> None:
        """Handle a replica that has started, or has finished its shard."""
        if replica not in self.work[stage]:
            self.free[stage].append(replica)
            return
        shard = self._stop_work(stage, replica)
        if stage == _SAMPLE:
            self.held[replica] = (shard, self.now)
        else:
            self.scored_at[shard] = self.now
            self.left -= 1
            self.free[stage].append(replica)

    def _flow(self) -> None:
        """Move shards and start work wherever possible, the end of the line first."""
        ready = self.waiting[_SCORE]
        while True:
            if ready and self.free[_SCORE]:
                self._start(_SCORE)
            elif self.held and (len(ready) < self.places or self.free[_SCORE]):
                replica = next(iter(self.held))  # the one that has held its shard the longest
                ready.append(self._let_go(replica))
                self.free[_SAMPLE].append(replica)
            elif self.waiting[_SAMPLE] and self.free[_SAMPLE]:
                self._start(_SAMPLE)
            else:
                break
        self.most_waiting = max(self.most_waiting, len(ready))

    def _start(self, stage: int) -> None:
        replica, shard = self.free[stage].popleft(), self.waiting[stage].popleft()
        self.work[stage][replica] = (shard, self.now)
        self._at(self.now + self.seconds[stage][shard], stage, replica)

    def _stop_work(self, stage: int, replica: int) -> int:
        shard, since = self.work[stage].pop(replica)
        self.busy[stage] += self.now - since
        return shard

    def _let_go(self, replica: int) -> int:
        shard, since = self.held.pop(replica)
        self.blocked += self.now - since
        return shard

    # --- failures ---

    def _next_failure(self) -> float:
        assert self.failing is not None
        return self.now + float(self.rng.exponential(self.failing.mtbf))

    def _fail(self, node: int) -> None:
        assert self.failing is not None
        self.failed += 1
        for stage, pool in enumerate(self.pools):
            for replica, nodes in enumerate(pool.nodes):
                if node in nodes:
                    self._lose(stage, replica)
                    self._at(self.now + self.failing.repair + pool.startup, stage, replica)
        self._at(self.failing.repair + self._next_failure(), _FAIL, node)

    def _lose(self, stage: int, replica: int) -> None:
        """Take a replica down; its shard is the next that another replica takes."""
        self.life[stage][replica] += 1
        if replica in self.free[stage]:
            self.free[stage].remove(replica)
        lost = []
        if replica in self.work[stage]:
            lost.append(self._stop_work(stage, replica))
        if stage == _SAMPLE and replica in self.held:
            lost.append(self._let_go(replica))
        self.waiting[stage].extendleft(lost)
        self.redone += len(lost)


def simulate(
    samplers: Pool, scorers: Pool, waiting_shards: int, failures: Failures | None = None
) -> Simulated:
    """Simulate the line until every shard is scored.

    Shards start in order. A shard lost to a failure restarts from the stage that lost it; sampled
    shards that wait are safe. Failures of a node under repair do not count.

    Raises BonbonError where shards take so long between failures that they hardly ever finish.
    """
    if failures:
        _check_lifetimes((samplers, scorers), failures)
    line = _Line((samplers, scorers), waiting_shards, failures)
    line.run()
    spans = [len(pool.nodes) * line.now for pool in (samplers, scorers)]
    return Simulated(
        seconds=line.now,
        scored_at=np.array(line.scored_at),
        sampler_busy=line.busy[_SAMPLE] / spans[_SAMPLE],
        sampler_blocked=line.blocked / spans[_SAMPLE],
        scorer_busy=line.busy[_SCORE] / spans[_SCORE],
        most_waiting=line.most_waiting,
        failures=line.failed,
        redone=line.redone,
    )


def _check_lifetimes(pools: Sequence[Pool], failures: Failures) -> None:
    for pool in pools:
        life = failures.mtbf / max(map(len, pool.nodes))
        longest = pool.startup + float(pool.seconds.max())
        if longest > _MOST_LIFETIMES * life:
            raise BonbonError(
                f"a shard takes up to {longest / 3600:.2g} hours with the start-up, and its nodes "
                f"fail every {life / 3600:.2g} hours; make job.shard_size smaller"
            )


def closed_form_seconds(samplers: Pool, scorers: Pool) -> float:
    """Return the slower stage's seconds: its start-up, and its work shared by its replicas.

    A lower bound for every line without failures.
    """
    return max(
        pool.startup + float(pool.seconds.sum()) / len(pool.nodes) for pool in (samplers, scorers)
    )


def stage_seconds(pool: Pool) -> float:
    """Return the seconds of one stage alone, each shard given to the first free replica."""
    ends = [pool.startup] * len(pool.nodes)
    for seconds in pool.seconds.tolist():
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
