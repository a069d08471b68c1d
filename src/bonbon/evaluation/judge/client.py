"""Asking a judge many questions at a time: workers, replies without a verdict, and refusals."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_attempt

from bonbon.config.evaluation import JudgeConfig
from bonbon.evaluation.judge.questions import Question, parse_verdict, request_of
from bonbon.evaluation.judge.store import Judgement
from bonbon.remote.blocking_client import BlockingClient, RefusedRequestError
from bonbon.remote.client import FaultError, Pauses, RefusedError
from bonbon.remote.endpoints import checked_endpoint, message_text, redacted
from bonbon.system.errors import BonbonError

# Seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_LONGEST_RETRY_AFTER = 600.0  # that a server may ask for
_GRACE = 2.0  # for the requests under way when a run is stopped

_Todo = SimpleQueue[tuple[str, Question] | None]

# So many refusals before the first reply are the configuration's fault, not the requests'.
_MOST_REFUSED = 8


_PATH = "chat/completions"


@dataclass(frozen=True)
class Judge:
    """A judge's server, and what the workers that ask it share."""

    config: JudgeConfig
    client: BlockingClient
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def connected(config: JudgeConfig) -> Iterator[Judge]:
    """A judge that may be asked. Raises BonbonError when its address or the key cannot be used."""
    client = BlockingClient(
        checked_endpoint(config.base_url, config.api_key_env, "judge"),
        timeout=config.client.timeout,
        retries=config.client.retries,
        concurrency=config.concurrency,
        pauses=Pauses(_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_RETRY_AFTER),
    )
    try:
        yield Judge(config, client)
    finally:
        client.close()


def url_of(config: JudgeConfig) -> str:
    """Return where requests go."""
    return f"{config.base_url.rstrip('/')}/{_PATH}"


@dataclass(frozen=True)
class _Refused:
    """A request that the endpoint refused, as the judgement without a verdict that it may be."""

    judgement: Judgement
    error: RefusedRequestError


_Outcome = Judgement | _Refused | Exception


class _Outcomes:
    """Outcomes of the workers, in order. One leaves once it is settled: no interrupt loses it.

    A queue's `get` can be interrupted when it has taken an item out but not returned it.
    """

    def __init__(self) -> None:
        self._arrived: deque[_Outcome] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()

    def put(self, outcome: _Outcome) -> None:
        self._arrived.append(outcome)
        self._bell.put(None)

    def first(self) -> _Outcome:
        """Wait for the first one that is not settled. Call it once for each."""
        self._bell.get()
        return self._arrived[0]

    def settle_first(self) -> None:
        self._arrived.popleft()

    def judgements(self) -> list[Judgement]:
        """Return those that are there and not settled."""
        return [outcome for outcome in self._arrived if isinstance(outcome, Judgement)]


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
    outcomes = _Outcomes()
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
            outcome = outcomes.first()
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, _Refused):
                waiting.append(outcome)
            else:
                has_replied = True
                keep(outcome)
            outcomes.settle_first()
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
        judge.client.stop()
        _wind_up(workers, todo, outcomes, keep)


def _work(judge: Judge, todo: _Todo, outcomes: _Outcomes) -> None:
    while (item := todo.get()) is not None and not judge.stop.is_set():
        try:
            outcomes.put(_judge_one(judge, *item))
        except RefusedRequestError as error:
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
    for judgement in outcomes.judgements():
        keep(judgement)


def _judge_one(judge: Judge, key: str, question: Question) -> Judgement:
    """Ask until there is a verdict or the retries are used up; the last reply is kept.

    Raises FaultError where the server does not answer, RefusedRequestError for what may be this
    request's fault alone, and BonbonError for any other refusal.
    """

    def pause(seconds: float) -> None:
        if judge.stop.wait(seconds):
            raise FaultError("stopped")

    def last(state: RetryCallState) -> Judgement:
        assert state.outcome is not None
        judgement: Judgement = state.outcome.result()
        return judgement

    asking = Retrying(
        retry=retry_if_result(lambda judgement: judgement.verdict is None),
        wait=Pauses(_FIRST_PAUSE, _FIRST_PAUSE),  # a server that is well is asked again soon
        stop=stop_after_attempt(judge.config.client.retries + 1),
        sleep=pause,
        retry_error_callback=last,
    )
    return asking(_ask, judge, key, question)


def _ask(judge: Judge, key: str, question: Question) -> Judgement:
    """Ask once. A reply that was cut at its limit of tokens never reached its last line."""
    try:
        reply, is_whole = judge.client.post(_PATH, request_of(judge.config, question), _read)
    except RefusedError as refusal:
        raise _refusal(judge, refusal, question.comparison.prompt_id) from refusal
    verdict = parse_verdict(reply) if is_whole else None
    return _judgement(key, question, verdict, redacted(reply, judge.client.endpoint.secret))


def _read(reply: Any) -> tuple[str, bool]:
    """Return the text of a reply, and whether it came to its own end."""
    choice = reply["choices"][0]
    is_whole = choice.get("finish_reason") != "length"
    return message_text(choice["message"].get("content")), is_whole


def _refusal(judge: Judge, refusal: RefusedError, prompt_id: str) -> BonbonError:
    if refusal.about_key:
        hint = refusal.message
    elif refusal.status == 404:
        hint = f"check judge.base_url, and judge.model, which is {judge.config.model!r}"
    elif refusal.status < 400:
        hint = "redirects are not followed; set judge.base_url to where it leads"
    else:
        hint = f"it was asked about prompt {prompt_id}"
    message = (
        f"the judge at {url_of(judge.config)} refuses with status {refusal.status} "
        f"({refusal.server_text}); {hint}"
    )
    return RefusedRequestError(message, True) if refusal.about_request else BonbonError(message)


def _judgement(key: str, question: Question, verdict: str | None, reply: str) -> Judgement:
    comparison = question.comparison
    place = (comparison.prompt_id, comparison.draw, question.swapped)
    return Judgement(key, *place, verdict, reply)
