"""The backend on a model in this process, on tiny models in float64: batches change nothing."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.catalogue import STRATEGIES, parse_strategy
from bonbon.decoding.source import LocalSource
from bonbon.decoding.strategy import Floats, Generation, Source, Strategy, WholeDraws, one_hot
from bonbon.demo import STORY_MODEL
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.models.loading import load_policy
from bonbon.rewards.reward import FunctionReward
from bonbon.sampling.cost import Cost
from bonbon.sampling.transformers import TransformersSampler
from bonbon.serve.answers import stream_id
from bonbon.serve.backend import Answer, AnswerJob, BackendError
from bonbon.serve.local import backend as local
from bonbon.serve.local.backend import LocalBackend
from bonbon.serve.local.queue import EncodedJob, PendingJob, next_batch
from bonbon.system.errors import BonbonError

MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
T = TypeVar("T")


class FirstDrawn(WholeDraws):
    """A strategy without a reward."""

    needs_reward: ClassVar[bool] = False

    def weights(self, group: Group, source: Source) -> Floats:
        return one_hot(0, group.n)


class Gate:
    """Where a test holds a `Held` strategy: `entered` when it is there, `opened` to let it go."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.left = threading.Event()


GATES: dict[str, Gate] = {}


class Held(FirstDrawn):
    """Waits at a gate as a model's forward passes would: `progress` may stop it."""

    gate: str

    def generate(self, prompts: Any, source: Any, reward: Any) -> list[Generation]:
        gate = GATES[self.gate]
        gate.entered.set()
        try:
            while not gate.opened.wait(0.001):
                source.progress(1)
        finally:
            gate.left.set()
        return super().generate(prompts, source, reward)


class Halving(Strategy):
    """Draws two tokens, keeps half of the rows, and branches them."""

    needs_reward: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

    def generate(self, prompts: Any, source: Any, reward: Any) -> list[Generation]:
        return [self._one(prompt, source) for prompt in prompts]

    def _one(self, prompt: EncodedPrompt, source: Any) -> Generation:
        rows = source.start(prompt, source.config.n)
        rows.draw(2)
        half = list(range(rows.n // 2))
        rows.select(half + half)
        rows.draw(source.config.max_new_tokens)
        return Generation(rows.group(), 0, Cost(rows.generated, rows.prefilled))


def reward(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    """Some number of a text."""
    return np.array([sum(map(ord, text)) % 97 / 97 for text in completions])


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    model, tokenizer = load_policy(str(tiny_model), device="cpu")
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def story() -> Any:
    return load_policy(str(STORY_MODEL), dtype="float32", device="cpu")


@pytest.fixture
def gate() -> Iterator[Gate]:
    GATES["gate"] = Gate()
    yield GATES["gate"]
    GATES["gate"].opened.set()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were drawn together, each time."""
    found: list[int] = []

    class Counting(LocalSource):
        def draw(self, prompts: Sequence[Any], ks: Sequence[range]) -> Any:
            found.append(len(prompts))
            return super().draw(prompts, ks)

    monkeypatch.setattr(local, "LocalSource", Counting)
    return found


def job_of(prompt: Any = "Once", n: int = 3, seconds: float = 60.0, **changes: Any) -> AnswerJob:
    sampling = changes.pop("sampling", {})
    values: dict[str, Any] = {
        "request_id": f"request-{time.monotonic_ns()}",
        "model": "tiny",
        "prompt": prompt,
        "sampling": SamplingConfig(**({"n": n, "max_new_tokens": 6} | sampling)),
        "strategy": BestOfN(),
        "choices": 1,
        "deadline": time.monotonic() + seconds,
    }
    return AnswerJob(**(values | changes))


def run(test: Coroutine[Any, Any, T]) -> T:
    """A test's coroutine; one that hangs fails."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await test

    return asyncio.run(bounded())


@asynccontextmanager
async def serving(
    policy: Any, scored_by: Any = reward, **changes: Any
) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(*policy, scored_by, "tiny", **changes)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def answers_to(policy: Any, *jobs: AnswerJob, scored_by: Any = reward, **changes: Any) -> list[Any]:
    """The outcomes of jobs that are asked for one after the other."""

    async def all_of() -> list[Any]:
        async with serving(policy, scored_by, **changes) as backend:
            found = []
            for job in jobs:
                found += await asyncio.gather(backend.answer(job), return_exceptions=True)
            return found

    return run(all_of())


def together(
    policy: Any, gate: Gate, *jobs: AnswerJob, scored_by: Any = reward, **changes: Any
) -> list[Any]:
    """The outcomes of jobs that all arrive while the model is busy."""

    async def all_of() -> list[Any]:
        async with serving(policy, scored_by, **changes) as backend:
            busy = asyncio.create_task(backend.answer(job_of(strategy=Held(gate="gate"))))
            await asyncio.to_thread(gate.entered.wait)
            tasks = [asyncio.create_task(backend.answer(job)) for job in jobs]
            await asyncio.sleep(0.01)
            gate.opened.set()
            await busy
            return await asyncio.gather(*tasks, return_exceptions=True)

    return run(all_of())


def bare(answer: Answer) -> Any:
    """An answer without its seconds."""
    cost = answer.cost
    return answer.choices, answer.generation.group, cost.generated, answer.prompt_tokens


# --- what an answer is ----------------------------------------------------------------------------


def test_an_answer_is_the_best_of_what_the_sampler_draws(tiny: Any) -> None:
    job = job_of(n=5, choices=2, seeded=True, sampling={"seed": 4, "temperature": 0.8})
    (answer,) = answers_to(tiny, job)
    sampler = TransformersSampler(*tiny, job.sampling.model_copy(update={"seed": 0}))
    ids = tuple(tiny[1]("Once")["input_ids"])
    (group,) = sampler.sample([EncodedPrompt(stream_id(job, ""), "Once", ids)])
    rewards = reward([], group.completions)
    assert answer.generation.group == group.with_rewards(rewards)
    order = sorted(range(5), key=lambda i: -rewards[i])[:2]
    assert [choice.index for choice in answer.choices] == order
    assert [choice.text for choice in answer.choices] == [group.completions[i] for i in order]
    assert answer.prompt_tokens == answer.cost.prefilled == len(ids)
    assert answer.cost.generated == sum(group.lengths())
    assert (answer.cost.reward_calls, answer.failed) == (5, 0)


def test_chat_goes_through_the_template(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = answers_to(tiny, job_of(MESSAGES))
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert "no chat template" in error.message
    monkeypatch.setattr(tiny[1], "chat_template", TEMPLATE)
    (answer,) = answers_to(tiny, job_of(MESSAGES))
    ids = tiny[1]("user:Hi\n", add_special_tokens=False)["input_ids"]
    assert answer.generation.group.prompt_token_ids == tuple(ids)


def test_a_stepwise_strategy_drops_and_branches(tiny: Any) -> None:
    first, again = answers_to(
        tiny, *(job_of(n=4, strategy=Halving(), seeded=True) for _ in range(2)), scored_by=None
    )
    assert bare(first) == bare(again)
    texts = first.generation.group.token_ids
    assert texts[0][:2] == texts[2][:2] and texts[1][:2] == texts[3][:2]  # noqa: PT018


def test_models_and_health(tiny: Any) -> None:
    async def test() -> None:
        backend = LocalBackend(*tiny, reward, "tiny")
        assert not await backend.healthy()
        await backend.start()
        assert await backend.healthy()
        assert await backend.models() == ("tiny",)
        await backend.close()
        assert not await backend.healthy()
        with pytest.raises(BackendError, match="stopping") as error:
            await backend.answer(job_of())
        assert error.value.status == 503

    run(test())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_answers_the_same_alone_and_together(
    tiny: Any, gate: Gate, name: str
) -> None:
    strategy = parse_strategy({"name": name} | ({"price": 1e-4} if name == "adaptive_n" else {}))
    jobs = [job_of(prompt, n=4, seeded=True, strategy=strategy) for prompt in ("Once", "A cat")]
    batched, alone = together(tiny, gate, *jobs), answers_to(tiny, *jobs)
    assert len(alone) == len(jobs)
    for one, other in zip(alone, batched, strict=True):
        assert isinstance(one, Answer), one
        assert one.generation.group.token_ids == other.generation.group.token_ids
        assert one.choices[0].text == one.generation.completion == other.choices[0].text
        assert one.cost.generated == other.cost.generated > 0


# --- batches --------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_what_else_is_answered(
    tiny: Any, gate: Gate, batches: list[int]
) -> None:
    prompts = ["Once", "Once upon a time", "A", "Once", "The cat", "Z" * 30, "Once"]
    jobs = [
        job_of(prompt, seeded=i % 2 == 0, sampling={"seed": i // 4}, logprobs=i % 3 or None)
        for i, prompt in enumerate(prompts)
    ]

    async def alone_and_together() -> tuple[list[Any], list[Any]]:
        async with serving(tiny) as backend:  # one backend, as unseeded jobs know its secret
            alone = [await backend.answer(job) for job in jobs]
            busy = asyncio.create_task(backend.answer(job_of(strategy=Held(gate="gate"))))
            await asyncio.to_thread(gate.entered.wait)
            tasks = [asyncio.create_task(backend.answer(job)) for job in jobs]
            await asyncio.sleep(0.01)
            gate.opened.set()
            await busy
            return alone, list(await asyncio.gather(*tasks))

    alone, batched = run(alone_and_together())
    assert batches == [1] * 7 + [1] + [7]
    for one, other in zip(alone, batched, strict=True):
        assert one.generation.group.token_ids == other.generation.group.token_ids
        assert [c.text for c in one.choices] == [c.text for c in other.choices]
        assert one.generation.group.logprobs == pytest.approx(other.generation.group.logprobs)
        assert one.cost.generated == other.cost.generated
        assert one.cost.prefilled == other.cost.prefilled


def test_a_seed_gives_the_same_answer_on_every_server(tiny: Any) -> None:
    def seeded(seed: int) -> AnswerJob:
        return job_of(seeded=True, sampling={"seed": seed})

    (first,), (again, other) = answers_to(tiny, seeded(3)), answers_to(tiny, seeded(3), seeded(4))
    assert bare(first) == bare(again)
    assert first.generation.group.token_ids != other.generation.group.token_ids


def test_without_a_seed_each_request_and_each_server_draws_anew(tiny: Any) -> None:
    jobs = [job_of(request_id="a"), job_of(request_id="b")]
    found = [*answers_to(tiny, *jobs), *answers_to(tiny, *jobs)]
    assert len({answer.generation.group.token_ids for answer in found}) == 4


def test_only_what_is_drawn_alike_is_drawn_together(
    tiny: Any, gate: Gate, batches: list[int]
) -> None:
    cold = {"temperature": 0.5}
    jobs = [
        job_of("A", sampling=cold),
        job_of("B"),
        job_of("C", sampling=cold | {"seed": 9}, seeded=True),
        job_of("D", stop=("x",)),
        job_of("E", strategy=FirstDrawn()),
        job_of("F"),
    ]
    outcomes = together(tiny, gate, *jobs)
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert batches == [1, 2, 2, 1, 1]


def encoded_job(kind: int, length: int, dead: bool) -> EncodedJob:
    job = job_of(sampling={"n": 2, "max_new_tokens": 5, "temperature": float(kind)})
    asked = PendingJob(job, None, None, given_up=dead)  # type: ignore[arg-type]
    return EncodedJob(asked, EncodedPrompt("p", "x", (1,) * length))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20), st.booleans()), max_size=12),
    st.integers(1, 150),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_batches_are_fair_and_within_the_budget(
    described: list[tuple[int, int, bool]], budget: int
) -> None:
    jobs = [encoded_job(*one) for one in described]
    alive = [job for job, (_, _, dead) in zip(jobs, described, strict=True) if not dead]
    queue, done = list(jobs), []
    while batch := next_batch(queue, budget):
        left = [job for job in alive if job not in done]
        assert batch[0] is left[0]  # who waited longest
        assert all(job.kind() == batch[0].kind() for job in batch)
        assert len(batch) == 1 or sum(job.tokens() for job in batch) <= budget
        assert batch == [job for job in left if job in batch]
        done += batch
    assert not queue
    assert sorted(map(id, done)) == sorted(map(id, alive))


# --- jobs that end early --------------------------------------------------------------------------


def test_a_cancelled_job_stops_the_model_when_it_is_alone(tiny: Any, gate: Gate) -> None:
    async def test() -> None:
        async with serving(tiny) as backend:
            task = asyncio.create_task(backend.answer(job_of(strategy=Held(gate="gate"))))
            await asyncio.to_thread(gate.entered.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(gate.left.wait)
            assert isinstance(await backend.answer(job_of()), Answer)

    run(test())
    assert not gate.opened.is_set()


def test_a_cancelled_job_leaves_the_others_of_its_batch(tiny: Any, gate: Gate) -> None:
    GATES["second"] = Gate()
    second = GATES["second"]

    async def test() -> None:
        async with serving(tiny) as backend:
            busy = asyncio.create_task(backend.answer(job_of(strategy=Held(gate="gate"))))
            await asyncio.to_thread(gate.entered.wait)
            jobs = [job_of(p, strategy=Held(gate="second"), seconds=s) for p, s in
                    (("A", 60), ("B", 60), ("C", 0.3))]  # fmt: skip
            tasks = [asyncio.create_task(backend.answer(job)) for job in jobs]
            await asyncio.sleep(0.01)
            gate.opened.set()
            await busy
            await asyncio.to_thread(second.entered.wait)
            tasks[0].cancel()
            with pytest.raises(BackendError) as error:
                await tasks[2]
            assert (error.value.status, error.value.kind) == (504, "timeout_error")
            assert not second.left.is_set()
            second.opened.set()
            assert (await tasks[1]).generation.group.prompt == "B"

    run(test())


def test_a_job_that_is_cancelled_while_it_waits_is_never_drawn(
    tiny: Any, gate: Gate, batches: list[int]
) -> None:
    async def test() -> None:
        async with serving(tiny) as backend:
            busy = asyncio.create_task(backend.answer(job_of(strategy=Held(gate="gate"))))
            await asyncio.to_thread(gate.entered.wait)
            tasks = [asyncio.create_task(backend.answer(job_of(p))) for p in "AB"]
            late = asyncio.create_task(backend.answer(job_of("C", seconds=0.05)))
            await asyncio.sleep(0.01)
            tasks[0].cancel()
            with pytest.raises(BackendError):
                await late
            gate.opened.set()
            await busy
            await tasks[1]

    run(test())
    assert batches == [1, 1]


def test_closing_stops_what_runs_and_what_waits(tiny: Any, gate: Gate) -> None:
    async def test() -> None:
        async with serving(tiny) as backend:
            tasks = [
                asyncio.create_task(backend.answer(job_of(strategy=strategy)))
                for strategy in (Held(gate="gate"), BestOfN())
            ]
            await asyncio.to_thread(gate.entered.wait)
            await backend.close()
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert len(errors) == 2
            for error in errors:
                assert isinstance(error, BackendError)
                assert error.status == 503

    run(test())


# --- jobs that fail -------------------------------------------------------------------------------


def bad_reward(failing: Callable[[], Any]) -> Any:
    def scored(prompts: Sequence[Any], completions: Sequence[str]) -> Any:
        return failing() if "bad" in prompts else reward(prompts, completions)

    return scored


def raise_(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    "failing",
    [
        lambda: raise_(KeyError("x")),
        lambda: raise_(BonbonError("reward function 'a:b' failed")),
        lambda: [math.nan] * 3,
        lambda: 1.0,
    ],
)
def test_one_failing_job_does_not_fail_the_others(
    tiny: Any, gate: Gate, batches: list[int], failing: Callable[[], Any]
) -> None:
    jobs = [job_of(prompt, seeded=True) for prompt in ("one", "bad", "two")]
    outcomes = together(tiny, gate, *jobs, scored_by=bad_reward(failing))
    assert batches == [1, 3, 1, 1, 1]
    assert isinstance(outcomes[1], BackendError)
    assert outcomes[1].status == 500
    alone = answers_to(tiny, jobs[0], jobs[2])
    assert [bare(answer) for answer in alone] == [bare(outcomes[0]), bare(outcomes[2])]


def test_what_does_not_fit_the_context(tiny: Any, gate: Gate) -> None:
    fits, long = "a" * (64 - 6 - 1), "a" * (64 - 6)  # and a token to begin with
    outcomes = together(tiny, gate, job_of(fits), job_of(long), job_of("a"))
    assert [isinstance(outcome, Answer) for outcome in outcomes] == [True, False, True]
    assert (outcomes[1].status, outcomes[1].code) == (400, "context_length_exceeded")
    assert "64 tokens; the prompt has 59 and the completion may have 6" in outcomes[1].message


class Broken(FirstDrawn):
    def weights(self, group: Group, source: Source) -> Floats:
        raise IndexError("secret detail")


class Unable(FirstDrawn):
    def weights(self, group: Group, source: Source) -> Floats:
        raise BonbonError("the strategy needs more than 2 candidates; raise n")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"extra": {"logit_bias": {}, "best_of": 2}}, 400, "takes no 'best_of', 'logit_bias'"),
        ({"strategy": Broken()}, 500, "the strategy failed: IndexError"),
        ({"strategy": Unable()}, 400, "raise n"),
        ({"strategy": BestOfN()}, 400, "best_of_n needs a reward and this server has none"),
        ({"seconds": -1.0, "strategy": FirstDrawn()}, 504, "within the request's time"),
    ],
)
def test_what_cannot_be_done(tiny: Any, changes: dict[str, Any], status: int, message: str) -> None:
    job = job_of(**({"strategy": FirstDrawn()} | changes))
    (error,) = answers_to(tiny, job, scored_by=None)
    assert error.status == status
    assert message in error.message
    assert "secret detail" not in error.message


def shouting(prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    raise FileNotFoundError(f"sk-0123456789 {prompts[0]} {completions[0]}")


def failing_extractor(text: str) -> str:
    raise ValueError(f"SECRET {text}")


def test_what_a_user_s_code_says_reaches_neither_client_nor_log(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = FunctionReward("my.code:shouting", shouting)
    extractor = "test_serve_local:failing_extractor"
    vote = parse_strategy({"name": "self_consistency", "extractor": extractor})
    for job, scored_by in (
        (job_of("PROMPTSECRET"), shouting),
        (job_of("PROMPTSECRET"), wrapped),
        (job_of("PROMPTSECRET", strategy=vote), None),
    ):
        (error,) = answers_to(tiny, job, scored_by=scored_by)
        assert error.status == 500
        assert error.message.endswith(("failed: FileNotFoundError", "failed: ValueError"))
    assert "FileNotFoundError at" in caplog.text  # who runs the server learns where
    assert "test_serve_local.py" in caplog.text
    assert "SECRET" not in caplog.text
    assert "sk-0123456789" not in caplog.text


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}]
)
def test_log_probabilities_are_those_that_were_drawn_by(tiny: Any, sampling: Any) -> None:
    job = job_of(n=4, choices=4, logprobs=259, sampling=sampling)
    (answer,) = answers_to(tiny, job)
    group = answer.generation.group
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == group.lengths()[choice.index]
        total = sum(token.logprob for token in choice.logprobs)
        assert total == pytest.approx(group.logprobs[choice.index], abs=1e-9)
        for token in choice.logprobs:
            values = [logprob for _, logprob in token.top]
            assert values == sorted(values, reverse=True)
            assert np.exp(values).sum() == pytest.approx(1)  # all tokens that can be drawn
            assert token.logprob in values
            assert len(values) <= job.sampling.top_k or job.sampling.top_k == 0


def test_tokens_of_a_choice_spell_its_text(story: Any) -> None:
    jobs = [
        job_of("Once upon a time", n=2, choices=2, logprobs=2, sampling={"max_new_tokens": 40}),
        job_of("Once upon a time", logprobs=0, stop=(".",), sampling={"max_new_tokens": 60}),
    ]
    free, stopped = answers_to(story, *jobs)
    for choice in free.choices:
        tokens = choice.logprobs
        assert "".join(token.token for token in tokens).removesuffix("</s>") == choice.text
        assert all(len(token.top) == 2 for token in tokens)
        assert all(token.top[0][1] >= token.logprob for token in tokens)
    (choice,) = stopped.choices
    assert choice.finish_reason == "stop"
    assert "." not in choice.text
    spelt = "".join(token.token for token in choice.logprobs)
    assert spelt.startswith(choice.text + ".")
    assert all(token.top == () for token in choice.logprobs)


def test_log_probabilities_agree_with_a_plain_forward_pass(tiny: Any) -> None:
    model, _ = tiny
    (answer,) = answers_to(tiny, job_of(logprobs=1))
    group, (choice,) = answer.generation.group, answer.choices
    ids = group.token_ids[choice.index]
    row = torch.tensor([[*group.prompt_token_ids, *ids]])
    with torch.inference_mode():
        log_probs = model(input_ids=row).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    expected = log_probs[torch.arange(len(ids)), torch.tensor(ids)]
    assert [token.logprob for token in choice.logprobs] == pytest.approx(expected.tolist())
    assert [token.top[0][1] for token in choice.logprobs] == pytest.approx(
        log_probs.max(-1).values.tolist()
    )
