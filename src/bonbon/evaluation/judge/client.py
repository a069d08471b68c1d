"""Asking a judge many questions at a time: workers, tries and the pauses between them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from bonbon.evaluation.judge.endpoint import Judge, NoReplyError, RefusedError, ask
from bonbon.evaluation.judge.questions import Question, parse_verdict, request_of
from bonbon.evaluation.judge.store import Judgement
from bonbon.remote.endpoints import backoff, redacted

# Seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_GRACE = 2.0  # for the requests under way when a run is stopped

_Todo = SimpleQueue[tuple[str, Question] | None]
_Outcomes = SimpleQueue["Judgement | _Refused | Exception"]

# So many refusals before the first reply are the configuration's fault, not the requests'.
_MOST_REFUSED = 8


@dataclass(frozen=True)
class _Refused:
    """A request that the endpoint refused, as the judgement without a verdict that it may be."""

    judgement: Judgement
    error: RefusedError


def ask_all(
    judge: Judge,
    questions: Mapping[str, Question],
    keep: Callable[[Judgement], None],
    report: Callable[[int], Any],
    has_replied: bool,
) -> None:
    """Ask everything; `keep` gets each judgement as it arrives. Raises what a worker raises.

    A request that is refused is kept as one without a verdict, once the judge is known to reply to
    others (`has_replied`: it did before); until then it waits, and a few of them end the run.

    A worker gets its next question once its last judgement is kept, so that a killed process loses
    at most one judgement a worker. Workers are daemons: one that waits for a server that hangs must
    not keep a stopped process alive.
    """
    todo: _Todo = SimpleQueue()
    outcomes: _Outcomes = SimpleQueue()
    upcoming = iter(questions.items())
    workers = [
        threading.Thread(target=_work, args=(judge, todo, outcomes), daemon=True)
        for _ in range(min(judge.config.concurrency, len(questions)))
    ]
    try:
        for worker in workers:
            worker.start()
            todo.put(next(upcoming))
        waiting: list[_Refused] = []
        for _ in questions:
            outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, _Refused):
                waiting.append(outcome)
            else:
                has_replied = True
                keep(outcome)
            if has_replied:
                for refused in waiting:
                    keep(refused.judgement)
                waiting.clear()
            elif len(waiting) == _MOST_REFUSED:
                raise waiting[0].error
            report(1)
            todo.put(next(upcoming, None))
        if waiting:
            raise waiting[0].error
    finally:
        judge.stop.set()
        _wind_up(workers, todo, outcomes, keep)


def _work(judge: Judge, todo: _Todo, outcomes: _Outcomes) -> None:
    while (item := todo.get()) is not None and not judge.stop.is_set():
        try:
            outcomes.put(_judge_one(judge, *item))
        except RefusedError as error:
            outcomes.put(_Refused(_judgement(*item, None, str(error)), error))
        except Exception as error:  # raised again by the thread that reads the outcomes
            outcomes.put(error)


def _wind_up(
    workers: Sequence[threading.Thread],
    todo: _Todo,
    outcomes: _Outcomes,
    keep: Callable[[Judgement], None],
) -> None:
    """Let the workers end, and keep what still arrives in a moment: it is paid for."""
    for _ in workers:
        todo.put(None)
    deadline = time.monotonic() + _GRACE
    for worker in workers:
        if worker.ident is not None:  # it was started
            worker.join(max(0.0, deadline - time.monotonic()))
    while not outcomes.empty():
        outcome = outcomes.get()
        if isinstance(outcome, Judgement):
            keep(outcome)


def _judge_one(judge: Judge, key: str, question: Question) -> Judgement:
    """Ask until there is a verdict or the retries are used up.

    A server that does not answer and a reply without a verdict have their retries each.
    """
    request = json.dumps(request_of(judge.config, question), ensure_ascii=False)
    body = request.encode(errors="replace")  # servers refuse lone surrogates, escaped or not
    failed = unread = 0
    while True:
        try:
            reply, is_whole = ask(judge, body, question.comparison.prompt_id)
            verdict = parse_verdict(reply) if is_whole else None
            if verdict is not None or unread == judge.config.client.retries:
                return _judgement(key, question, verdict, redacted(reply, judge.secret))
            unread += 1
            pause = _pause(0)
        except NoReplyError as error:
            if failed == judge.config.client.retries:
                raise
            pause = max(_pause(failed), error.retry_after)
            failed += 1
        if judge.stop.wait(pause):
            raise NoReplyError("stopped")


def _judgement(key: str, question: Question, verdict: str | None, reply: str) -> Judgement:
    comparison = question.comparison
    place = (comparison.prompt_id, comparison.draw, question.swapped)
    return Judgement(key, *place, verdict, reply)


def _pause(attempt: int) -> float:
    """Seconds before the next try."""
    return backoff(attempt, _FIRST_PAUSE, _LONGEST_PAUSE)
