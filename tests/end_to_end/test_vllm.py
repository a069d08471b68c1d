"""The backend in front of a true vLLM server, on the demo's story model.

Needs a Python with vLLM, which `make test-vllm` sees to; BONBON_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import httpx
import numpy as np
import openai
import pytest
import torch

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding.best_of_n import BestOfN
from bonbon.decoding.strategy import Floats, Source, WholeDraws, one_hot
from bonbon.demo import REWARD_MODEL, STORY_MODEL
from bonbon.groups.group import Group
from bonbon.models.loading import load_policy
from bonbon.models.logprobs import token_log_probs
from bonbon.rewards.model import RewardModel
from bonbon.serve.backend import Answer, AnswerJob, BackendError
from bonbon.serve.upstream.backend import UpstreamBackend
from bonbon.serve.upstream.client import UpstreamConfig
from support.vllm_server import SERVER_SETTINGS, Server

PROMPTS = [
    "Once upon a time, there was a cat who",
    "One day, a parrot flew in and said,",
    "The little elf lost the key to the toy room. He",
    "Grandma baked a cake, and",
]
T = TypeVar("T")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = ("--max-model-len", "200", "--override-generation-config", SERVER_SETTINGS)
    log = tmp_path_factory.mktemp("vllm") / "log"
    server = Server(STORY_MODEL, log, "--served-model-name", "story", *settings)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained(str(REWARD_MODEL), device="cpu")


@pytest.fixture(scope="module")
def story() -> Any:
    return load_policy(str(STORY_MODEL), dtype="float32", device="cpu")


class MostLikely(WholeDraws):
    needs_reward: ClassVar[bool] = False
    needs_logprobs: ClassVar[bool] = True

    def weights(self, group: Group, source: Source) -> Floats:
        return one_hot(int(np.argmax(group.logprobs)), group.n)


def job_of(
    prompt: Any = PROMPTS[0], n: int = 8, seconds: float = 120.0, **changes: Any
) -> AnswerJob:
    sampling = changes.pop("sampling", {})
    values: dict[str, Any] = {
        "request_id": f"request-{time.monotonic_ns()}",
        "model": "story",
        "prompt": prompt,
        "sampling": SamplingConfig(**({"n": n, "max_new_tokens": 40} | sampling)),
        "strategy": BestOfN(),
        "choices": 1,
        "deadline": time.monotonic() + seconds,
    }
    return AnswerJob(**(values | changes))


def outcomes_of(
    vllm: Server, reward: Any, *jobs: AnswerJob, meanwhile: Coroutine[Any, Any, None] | None = None
) -> list[Any]:
    """What becomes of jobs that are asked for at the same time."""

    async def all_of() -> list[Any]:
        config = UpstreamConfig(base_url=vllm.url, concurrency=64, retries=2, timeout=60)
        backend = UpstreamBackend(config, reward)
        await backend.start()
        try:
            tasks = [asyncio.create_task(backend.answer(job)) for job in jobs]
            if meanwhile is not None:
                await meanwhile
            return list(await asyncio.gather(*tasks, return_exceptions=True))
        finally:
            await backend.close()

    return asyncio.run(all_of())


def test_the_best_of_n_by_a_real_reward(vllm: Server, reward: RewardModel, story: Any) -> None:
    outcomes = outcomes_of(vllm, reward, *(job_of(p, choices=8) for p in PROMPTS))
    for prompt, answer in zip(PROMPTS, outcomes, strict=True):
        assert isinstance(answer, Answer), answer
        group = answer.generation.group
        assert len(set(group.completions)) > 4  # the server's own settings were turned off
        expected = reward([prompt] * 8, list(group.completions))
        assert list(group.rewards or ()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer.choices[0].reward == max(group.rewards or ())
        assert [c.reward for c in answer.choices] == sorted(group.rewards or (), reverse=True)
        assert answer.prompt_tokens == len(story[1](prompt)["input_ids"])
        assert answer.cost.generated == sum(group.lengths())
        assert max(group.lengths()) <= 40
        assert set(group.finish_reasons) <= {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_model(
    vllm: Server, story: Any, temperature: float
) -> None:
    """vLLM gives those at temperature 1 whatever it draws at."""
    names = {"return_tokens_as_token_ids": True}
    jobs = [
        job_of(
            prompt,
            choices=8,
            strategy=MostLikely() if temperature == 1 else BestOfN(),
            logprobs=0,
            extra=names,
            sampling={"temperature": temperature, "max_new_tokens": 120},
        )
        for prompt in PROMPTS
    ]
    model, tokenizer = story
    differences, ended = [], 0
    for answer in outcomes_of(vllm, lambda p, c: np.zeros(len(c)), *jobs):
        assert isinstance(answer, Answer), answer
        group = answer.generation.group
        prompt_ids = tokenizer(group.prompt)["input_ids"]
        for choice in answer.choices:
            ids = [int(token.token.removeprefix("token_id:")) for token in choice.logprobs or ()]
            assert len(ids) == group.lengths()[choice.index]
            ended += choice.finish_reason == "stop"
            assert (ids[-1] == tokenizer.eos_token_id) == (choice.finish_reason == "stop")
            with torch.inference_mode():
                logits = model(torch.tensor([prompt_ids + ids])).logits[:, -len(ids) - 1 : -1]
            ours = token_log_probs(logits, torch.tensor([ids])).sum().item()
            differences.append(abs(ours - group.logprobs[choice.index]))
        if temperature == 1:
            assert answer.choices[0].index == int(np.argmax(group.logprobs))
    print(f"largest difference of {len(differences)} sums: {max(differences):.2g} nats")
    assert max(differences) < 1e-3
    assert 0 < ended < len(differences)


def test_a_seed_gives_the_same_candidates_again(vllm: Server, reward: RewardModel) -> None:
    jobs = [job_of(seeded=True, sampling={"seed": seed}) for seed in (5, 5, 6)]
    first, again, other = outcomes_of(vllm, reward, *jobs)
    assert first.generation.group.completions == again.generation.group.completions
    assert len(set(first.generation.group.completions)) > 4
    assert first.generation.group.completions != other.generation.group.completions
    unseeded = outcomes_of(vllm, reward, job_of(), job_of())
    assert unseeded[0].generation.group.completions != unseeded[1].generation.group.completions


def test_stop_strings_and_greedy_draws(vllm: Server, reward: RewardModel) -> None:
    stopped, greedy = outcomes_of(
        vllm, reward, job_of(stop=(".",), choices=8), job_of(n=4, sampling={"top_k": 1})
    )
    assert all("." not in choice.text for choice in stopped.choices)
    assert any(choice.finish_reason == "stop" for choice in stopped.choices)
    assert len(set(greedy.generation.group.completions)) == 1


def test_what_vllm_refuses_is_the_clients_error(vllm: Server, reward: RewardModel) -> None:
    jobs = [
        job_of(sampling={"max_new_tokens": 500}),
        job_of(model="nothing"),
        job_of([{"role": "user", "content": "Hello"}]),
        job_of("word " * 300),
    ]
    errors = outcomes_of(vllm, reward, *jobs)
    assert [error.status for error in errors] == [400, 404, 400, 400]
    assert "max_model_len" in errors[0].message
    assert "`nothing` does not exist" in errors[1].message
    assert "chat template" in errors[2].message


def test_twenty_jobs_at_once(vllm: Server, reward: RewardModel) -> None:
    jobs = [job_of(PROMPTS[i % len(PROMPTS)], n=4) for i in range(20)]
    began = time.monotonic()
    outcomes = outcomes_of(vllm, reward, *jobs)
    seconds = time.monotonic() - began
    assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
    assert all(answer.failed == 0 and answer.generation.group.n == 4 for answer in outcomes)
    tokens = sum(answer.cost.generated for answer in outcomes)
    print(f"20 jobs, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s")


def test_the_official_client_through_the_whole_server(vllm: Server, reward: RewardModel) -> None:
    """client → `bonbon serve` → vLLM."""
    command = [
        sys.executable, "-m", "bonbon", "serve", "--upstream", vllm.url,
        "--reward", str(REWARD_MODEL), "--n", "6", "--port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[3].rstrip(";")
            client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
            assert [model.id for model in client.models.list()] == ["story"]
            ask = partial(client.completions.create, model="story", max_tokens=30, seed=3)
            whole = ask(prompt=PROMPTS[0], n=2, extra_body={"bonbon": {"return_candidates": True}})
            details = whole.model_extra["bonbon"]
            rewards = reward([PROMPTS[0]] * 6, [one["text"] for one in details["candidates"]])
            assert details["rewards"] == pytest.approx(sorted(rewards, reverse=True)[:2], abs=1e-5)
            assert whole.usage is not None
            assert whole.usage.completion_tokens == sum(o["tokens"] for o in details["candidates"])
            pieces = [part.choices[0].text for part in ask(prompt=PROMPTS[0], stream=True)]
            assert "".join(pieces) == whole.choices[0].text
            soft = {"best_of": 3, "strategy": {"name": "soft_best_of_n", "tau": 0.5}}
            assert ask(prompt=PROMPTS[1], extra_body=soft).model_extra["bonbon"]["drawn"] == 3
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="nothing", prompt="a")
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_a_server_that_is_killed_while_it_draws(vllm: Server, reward: RewardModel) -> None:
    """The last test: nothing is left of the server."""

    async def kill() -> None:
        async with httpx.AsyncClient() as client:
            while True:  # until it draws
                metrics = (await client.get(vllm.url.removesuffix("/v1") + "/metrics")).text
                running = [
                    float(line.split()[-1])
                    for line in metrics.splitlines()
                    if line.startswith("vllm:num_requests_running")
                ]
                if sum(running) > 0:
                    break
        await asyncio.to_thread(vllm.kill)

    jobs = [job_of(PROMPTS[0], n=32, sampling={"max_new_tokens": 180}) for _ in range(4)]
    outcomes = outcomes_of(vllm, reward, *jobs, meanwhile=kill())
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, BackendError)]
    assert len(answers) + len(errors) == 4, outcomes
    assert {error.status for error in errors} <= {502}
    # What had come by then is answered with.
    lost = sum(answer.failed for answer in answers) + 32 * len(errors)
    assert lost > 0
    for answer in answers:
        assert answer.generation.group.n + answer.failed == 32
        assert answer.choices[0].reward == max(answer.generation.group.rewards or ())
    late = replace(job_of(), deadline=time.monotonic() + 20)
    (error,) = outcomes_of(vllm, reward, late)
    assert isinstance(error, BackendError)
    assert error.status == 502
