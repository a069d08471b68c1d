"""Drawing from a server over real sockets: a stub that fails as servers do."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bonbon.cluster import workers
from bonbon.config.sampling import ClientSettings, OpenAISamplerConfig, SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.remote import client as remote_client
from bonbon.remote.blocking_client import RefusedRequestError
from bonbon.sampling.openai import OpenAISampler
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError, UnavailableError
from support.models import BOS, EOS, byte_tokenizer
from support.stub_upstream import FAULTS, StubUpstream, serving, some_faults

KEY = "sk-0123456789-secret"
MESSAGES = [{"role": "user", "content": "Hello?"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
ROWS = [PromptRow(f"p{i}", f"Once upon a time {i}") for i in range(5)]
TOKENIZER = byte_tokenizer()
CLIENT = ClientSettings.model_fields.keys()
VLLM: dict[str, Any] = {
    "owned_by": "vllm",
    "ids": lambda text: [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS],
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "_FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote_client, "_LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextmanager
def drawing(
    stub: StubUpstream,
    sampling: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    stream: str = "",
    context: int | None = None,
    **settings: Any,
) -> Iterator[OpenAISampler]:
    """A sampler of a running stub."""
    client = {"timeout": 10.0} | {key: settings.pop(key) for key in CLIENT & settings.keys()}
    with serving(stub):
        sampler = OpenAISampler(
            tokenizer,
            SamplingConfig(**({"n": 3, "max_new_tokens": 60} | (sampling or {}))),
            OpenAISamplerConfig(base_url=stub.url, client=ClientSettings(**client), **settings),
            stream,
            context,
        )
        try:
            yield sampler
        finally:
            sampler.close()


def drawn(
    stub: StubUpstream,
    rows: Sequence[PromptRow] = ROWS,
    sampling: dict[str, Any] | None = None,
    progress: Any = None,
    **changes: Any,
) -> list[Group]:
    with drawing(stub, sampling, **changes) as sampler:
        return sampler.sample(sampler.encode(rows), progress)


def error_of(stub: StubUpstream, rows: Sequence[PromptRow] = ROWS, **changes: Any) -> str:
    with pytest.raises(BonbonError) as error:
        drawn(stub, rows, **changes)
    return str(error.value)


def decoded(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_token_ids_go_there_and_come_back(owner: str) -> None:
    stub = StubUpstream(**VLLM | {"owned_by": owner})
    groups = drawn(stub)
    assert [group.prompt_id for group in groups] == [row.prompt_id for row in ROWS]
    for row, group in zip(ROWS, groups, strict=True):
        assert group.prompt == row.prompt
        assert group.prompt_token_ids == tuple(TOKENIZER(row.prompt)["input_ids"])
        assert group.n == 3
        assert set(group.completions) <= set(stub.tokens)
        for text, ids, logprob in zip(
            group.completions, group.token_ids, group.logprobs, strict=True
        ):
            assert ids[-1] == EOS
            assert decoded(ids) == text
            assert logprob == pytest.approx(sum(-0.25 * (i + 1) for i in range(len(ids))))
        asked = [b for b in stub.bodies if tuple(b["prompt"]) == group.prompt_token_ids]
        assert sum(body["n"] for body in asked) == 3
    assert len({text for group in groups for text in group.completions}) == 15
    for body in stub.bodies[1:]:  # the first asks what the server is like
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 1.0, 60)
        assert body["min_p"] == 0
        assert body["return_token_ids"] is True


def test_a_text_comes_back_from_other_servers() -> None:
    stub = StubUpstream()
    (group, *_) = drawn(stub)
    assert {body["prompt"] for body in stub.bodies} == {row.prompt for row in ROWS}
    assert not any({"return_token_ids", "logprobs"} & body.keys() for body in stub.bodies)
    for text, ids in zip(group.completions, group.token_ids, strict=True):
        assert ids == (*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS)
    assert all(math.isnan(logprob) for logprob in group.logprobs)


def test_messages_go_as_they_are_or_as_the_policys_own_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [PromptRow("c", MESSAGES)]
    hosted, vllm = StubUpstream(), StubUpstream(**VLLM)
    (group,) = drawn(hosted, rows, tokenizer=tokenizer)
    assert {json.dumps(body["messages"]) for body in hosted.bodies} == {json.dumps(MESSAGES)}
    assert set(hosted.paths) == {"/v1/chat/completions"}
    assert group.token_ids[0][-1] == EOS
    (group,) = drawn(vllm, rows, tokenizer=tokenizer)
    ids = tokenizer("[user]Hello?[assistant]", add_special_tokens=False)["input_ids"]
    assert vllm.bodies[-1]["prompt"] == ids == list(group.prompt_token_ids)


@pytest.mark.parametrize(
    ("stub", "sampling", "said"),
    [
        (VLLM, {}, ("token_ids", "drawn", "server")),
        (VLLM, {"temperature": 0.7}, ("token_ids", "drawn", "none")),
        (VLLM, {"top_p": 0.9}, ("token_ids", "drawn", "none")),
        (VLLM, {"top_k": 5}, ("token_ids", "drawn", "none")),
        (VLLM | {"ids": None}, {}, ("token_ids", "retokenised", "none")),  # an older version
        (VLLM | {"owned_by": "llamacpp", "ids": None}, {}, ("token_ids", "retokenised", "none")),
        ({"owned_by": "openai"}, {}, ("text", "retokenised", "none")),
    ],
)
def test_what_it_says_of_itself_is_so(stub: Any, sampling: Any, said: tuple[str, ...]) -> None:
    server = StubUpstream(**stub)
    with drawing(server, sampling) as sampler:
        described = sampler.described()
        groups = sampler.sample(sampler.encode(ROWS))
    assert described == {
        "sampler": "openai",
        "server": stub["owned_by"],
        "server_model": "stub",
        **dict(zip(("prompts_sent", "token_ids", "logprobs"), said, strict=True)),
    }
    kept = {not math.isnan(logprob) for group in groups for logprob in group.logprobs}
    assert kept == {said[2] == "server"}
    assert {isinstance(body["prompt"], list) for body in server.bodies} == {said[0] == "token_ids"}


def test_text_is_tokenised_as_it_stands_behind_the_prompt() -> None:
    """A tokenizer that marks the beginning of a word: alone, a completion has another one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<s>", "</s>", "▁", *("▁ab", "ab", "c", "d", "a", "b")]
    merges = [("a", "b"), ("▁", "ab")]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    text = {"text": "ab"}

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["choices"][0] |= text
        return found

    (group,) = drawn(
        StubUpstream(reply=reply), [PromptRow("p", "cd")], {"n": 1}, tokenizer=tokenizer
    )
    assert tokenizer("ab")["input_ids"] == [names.index("▁ab")]
    assert group.token_ids == ((names.index("ab"), 1),)
    # Where the seam has a token of its own, alone is all that is left.
    text["text"] = "b"
    (group,) = drawn(
        StubUpstream(reply=reply), [PromptRow("p", "ca")], {"n": 1}, tokenizer=tokenizer
    )
    assert group.token_ids == ((*tokenizer("b", add_special_tokens=False)["input_ids"], 1),)


def test_a_completion_that_was_cut_has_no_end_token() -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["choices"][0]["finish_reason"] = "length"
        found["usage"]["completion_tokens"] = 60
        return found

    (group, *_) = drawn(StubUpstream(reply=reply))
    assert set(group.finish_reasons) == {"length"}
    assert not any(EOS in ids for ids in group.token_ids)


def test_a_prompt_that_was_cut_is_sent_as_it_is_trained_on() -> None:
    rows = [PromptRow("long", "0123456789" * 3)]
    sampling = {"on_long_prompt": "truncate"}
    for stub in (StubUpstream(), StubUpstream(**VLLM)):
        (group,) = drawn(stub, rows, sampling, context=60 + 11)
        assert decoded(group.prompt_token_ids) == "0123456789"
        sent = stub.bodies[-1]["prompt"]
        assert sent == "0123456789" or tuple(sent) == group.prompt_token_ids


@pytest.mark.parametrize(("server", "own"), [(70, None), (70, 1000), (1000, 70), (None, 70)])
def test_the_shorter_context_counts(server: int | None, own: int | None) -> None:
    stub = StubUpstream(**VLLM, context=server)
    message = error_of(stub, context=own)
    assert "than the 10 tokens that the model's context leaves" in message


# --- seeds ----------------------------------------------------------------------------------------


def seeds_of(stub: StubUpstream) -> list[tuple[str, int]]:
    return [
        (json.dumps(body["prompt"]), body["seed"] + i)
        for body in stub.bodies
        if "seed" in body
        for i in range(body["n"])
    ]


@pytest.mark.parametrize("server", [VLLM, {}])
def test_no_two_draws_share_a_seed(server: dict[str, Any]) -> None:
    stub = StubUpstream(**server)
    rows = [PromptRow(f"q{i}", f"prompt {i}") for i in range(30)]
    drawn(stub, rows, {"n": 20})
    seeds = [seed for _, seed in seeds_of(stub)]
    assert len(seeds) == len(set(seeds)) == 600
    assert all(0 <= seed < 2 ** (63 if server else 31) for seed in seeds)
    assert {body["n"] for body in stub.bodies if "seed" in body} == ({8, 4} if server else {1})


def test_a_seed_gives_the_same_groups_again_whatever_is_asked_together() -> None:
    first = drawn(StubUpstream(**VLLM), sampling={"n": 10})
    assert drawn(StubUpstream(**VLLM), ROWS[::-1], {"n": 10}) == first[::-1]
    (alone,) = drawn(StubUpstream(**VLLM), ROWS[:1], {"n": 5})
    assert alone == first[0].part(0, 5)
    for changes in ({"sampling": {"n": 10, "seed": 1}}, {"sampling": {"n": 10}, "stream": "other"}):
        other = drawn(StubUpstream(**VLLM), **changes)
        texts = {text for group in other for text in group.completions}
        assert not texts & {text for group in first for text in group.completions}


def test_greedy_is_asked_for_as_every_server_has_it() -> None:
    stub = StubUpstream()
    drawn(stub, sampling={"top_k": 1})
    assert {body["temperature"] for body in stub.bodies} == {0.0}
    assert not any("top_k" in body for body in stub.bodies)
    stub = StubUpstream(**VLLM)
    drawn(stub, sampling={"top_k": 1})
    assert {body.get("n", 1) for body in stub.bodies} == {1}  # or vLLM refuses


# --- servers that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("server", [VLLM, {}])
def test_hundreds_of_requests_while_a_third_fails(server: dict[str, Any]) -> None:
    kinds = (*FAULTS, "garbage")
    stub = StubUpstream(fault=some_faults(0.33, kinds), delay=0.002, **server)
    rows = [PromptRow(f"q{i}", f"prompt {i}") for i in range(100)]
    counts: list[int] = []
    groups = drawn(stub, rows, progress=counts.append, timeout=1.0, concurrency=32)
    assert set(stub.faults) == {"", *kinds}  # each kind occurred
    assert groups == drawn(StubUpstream(**server), rows)  # as if nothing had
    assert sum(counts) == sum(sum(group.lengths()) for group in groups)
    assert stub.most_busy <= 32


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_at_a_time_than_set(limit: int) -> None:
    stub = StubUpstream(delay=0.03)
    drawn(stub, concurrency=limit)
    assert stub.most_busy == limit


def test_a_deadline_begins_with_the_first_try() -> None:
    stub = StubUpstream(delay=0.2)
    drawn(stub, concurrency=1, deadline=1.5)  # 3 seconds for all
    assert len(stub.tokens) == 15


@pytest.mark.parametrize("changes", [{"timeout": 60.0, "deadline": 0.5}, {"timeout": 0.1}])
def test_a_server_that_hangs_is_given_up(changes: dict[str, Any]) -> None:
    lost = "Once upon a time 3"
    stub = StubUpstream(fault=lambda request, _: "slow" if lost in request else "")
    began = time.monotonic()
    message = error_of(stub, retries=2, **changes)
    assert time.monotonic() - began < 5
    assert "of prompt p3: " in message
    assert stub.url in message
    assert f"sampler.client.deadline = {changes.get('deadline', 600.0):g}" in message
    assert stub.faults["slow"] <= 3 * 3


def test_a_pause_that_the_server_asks_for_is_kept() -> None:
    times: list[float] = []

    def fault(_request: str, attempt: int) -> str:
        times.append(time.monotonic())
        return "429" if attempt == 0 else ""

    drawn(StubUpstream(fault=fault, retry_after="1"), ROWS[:1], {"n": 1})
    assert 1 <= times[1] - times[0] < 3


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    stub = StubUpstream(fault=lambda *_: "429", retry_after="3000")
    message = error_of(stub)  # would hang
    assert "status 429" in message
    assert "it asks for 3000 seconds" in message


def test_a_draw_is_tried_as_often_as_set() -> None:
    stub = StubUpstream(fault=lambda *_: "503")
    message = error_of(stub, ROWS[:1], sampling={"n": 1}, retries=4)
    assert stub.faults == {"503": 5}
    assert len({json.dumps(body) for body in stub.bodies}) == 1  # with the same seed
    assert "draw 1 of prompt p0: status 503: no, status 503" in message
    assert "sampler.client.retries = 4" in message


@pytest.mark.parametrize(("status", "of_the_request"), [(400, True), (404, False), (302, False)])
def test_a_refusal_names_the_prompt(status: int, of_the_request: bool) -> None:
    stub = StubUpstream(fault=lambda request, _: str(status) if "time 2" in request else "")
    with pytest.raises(RefusedRequestError) as error:
        drawn(stub)
    assert "refuses draw" in str(error.value)
    assert f"of prompt p2: status {status}: no, status {status}" in str(error.value)
    assert error.value.about_request == of_the_request


def test_after_a_failure_the_rest_is_given_up_and_the_next_call_works() -> None:
    stub = StubUpstream(
        fault=lambda request, _: (
            "400" if "time 0" in request else "slow" if "endless" in request else ""
        )
    )
    rows = [*ROWS, PromptRow("slow", "endless")]
    with drawing(stub, timeout=1000.0) as sampler:
        with pytest.raises(BonbonError):
            sampler.sample(sampler.encode(rows))
        while stub.busy:
            time.sleep(0.005)
        assert len(sampler.sample(sampler.encode(ROWS[1:]))) == 4


def finishing(reason: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["choices"][-1]["finish_reason"] = reason
        return found

    return reply


@pytest.mark.parametrize("server", [VLLM, {}])
@pytest.mark.parametrize("reason", ["content_filter", "tool_calls"])
def test_a_filtered_draw_makes_no_smaller_group(server: dict[str, Any], reason: str) -> None:
    stub = StubUpstream(reply=finishing(reason), **server)
    message = error_of(stub, ROWS[:1])
    assert f"finish_reason '{reason}'" in message
    assert "of prompt p0" in message
    assert all(count == 1 for count in stub.asked.values())  # nothing would change


def test_an_aborted_draw_is_drawn_again() -> None:
    seen: Counter[str] = Counter()

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        text = found["choices"][0]["text"]
        seen[text] += 1
        return finishing("abort")(found) if seen[text] == 1 else found

    groups = drawn(StubUpstream(reply=reply))
    assert set(seen.values()) == {2}
    assert groups == drawn(StubUpstream())


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The last choice of a reply, or its usage, with other fields."""

    def reply(found: dict[str, Any]) -> dict[str, Any]:
        for name, value in fields.items():
            where = found["usage"] if name in found["usage"] else found["choices"][-1]
            where[name] = value(where[name]) if callable(value) else value
        return found

    return reply


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (changed(token_ids=None), "no longer have token ids"),
        (changed(token_ids=[]), "no longer have token ids"),
        (changed(token_ids=lambda ids: [*ids[:-1], -1]), "no longer have token ids"),
        (changed(token_ids=lambda ids: [*ids[:-1], "x"]), "no longer have token ids"),
        (changed(completion_tokens=lambda n: n + 1), "token ids"),
        (changed(completion_tokens=None), "how many tokens"),
        (changed(prompt_tokens=lambda n: n + 1), "tokens of a prompt of 19"),
        (changed(finish_reason="length"), "by its own limit"),
        (changed(text=" another"), "tokenizer is not the model's"),
        (changed(logprobs=None), "0 log-probabilities"),
        (changed(logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}), "1 log-probabilities"),
    ],
)
def test_what_cannot_be_is_no_draw(reply: Any, reason: str) -> None:
    stub = StubUpstream(**VLLM)
    with drawing(stub) as sampler:
        assert sampler.terms.gives_ids
        stub.reply = reply
        with pytest.raises(BonbonError, match=r"draw 1 to 3 of prompt p0: ") as error:
            sampler.sample(sampler.encode(ROWS[:1]))
    assert reason in str(error.value)
    assert set(stub.asked.values()) == {1}


@pytest.mark.parametrize("value", [5.0, math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_none(value: float) -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        for choice in found["choices"]:
            if choice["logprobs"]:
                choice["logprobs"]["token_logprobs"][1] = value
        return found

    message = error_of(StubUpstream(**VLLM, reply=reply))
    assert "logits" in message or "invalid log-probability" in message or "0" in message
    assert "of prompt p" in message


def test_a_reply_with_too_few_completions_is_no_group() -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["choices"] = found["choices"][:2]
        return found

    assert "2 completions of 3" in error_of(StubUpstream(**VLLM, reply=reply))


def test_completions_are_put_in_the_order_of_their_seeds() -> None:
    def reply(found: dict[str, Any]) -> dict[str, Any]:
        found["choices"].reverse()
        return found

    assert drawn(StubUpstream(**VLLM, reply=reply)) == drawn(StubUpstream(**VLLM))


# --- models, addresses and keys -------------------------------------------------------------------


def test_which_model_is_asked_for() -> None:
    stub = StubUpstream(models=("a", "b"))
    assert "several models; set sampler.model to one of a, b" in error_of(stub)
    drawn(stub, model="b")
    assert {body["model"] for body in stub.bodies} == {"b"}


def test_a_server_that_does_not_name_its_models() -> None:
    for fault in ("500", "401"):
        stub = StubUpstream()
        stub.models_fault = fault
        assert "its models: status" in error_of(stub, model="stub")
    stub.models_fault = "404"  # a server of one model that lists none
    assert drawn(stub, model="stub")[0].n == 3
    assert "its models: status 404" in error_of(stub)


def test_a_server_that_is_slow_to_name_its_models_is_no_prompt_s_fault() -> None:
    """So a worker on a cluster does not try its prompts one by one."""
    stub = StubUpstream()
    stub.models_fault = "slow"
    with drawing(stub, timeout=0.2) as sampler, pytest.raises(UnavailableError) as error:
        sampler.encode(ROWS)
    assert "give its models: it took longer than 0.2 seconds; wait until" in str(error.value)
    assert not workers._may_have_broken(error.value)


def test_a_server_that_is_not_there() -> None:
    sampler = OpenAISampler(
        TOKENIZER, SamplingConfig(), OpenAISamplerConfig(base_url="http://127.0.0.1:9/v1")
    )
    with pytest.raises(BonbonError, match=r"at http://127\.0\.0\.1:9/v1 did not give its models"):
        sampler.encode(ROWS)
    sampler.close()


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub = StubUpstream(key=KEY)
    drawn(stub)
    assert {headers["authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    # It is not in what a server says either, nor in what is made of it.
    for reply in (
        finishing(f"{KEY}"),
        lambda found: {"error": {"message": f"bad {KEY}"}},
        lambda found: found | {"choices": KEY},
    ):
        message = error_of(StubUpstream(key=KEY, reply=reply), retries=0)
        assert KEY not in message
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-0123")
    message = error_of(StubUpstream(key=KEY))
    assert "OPENAI_API_KEY, which is set but not accepted" in message
    assert "sk-" not in message


@pytest.mark.parametrize("url", ["localhost:8000", "http://u:p@host/v1", "http://h/v1?key=1", ""])
def test_an_address_that_cannot_be_used(url: str) -> None:
    with pytest.raises(BonbonError, match=r"^sampler\.base_url "):
        OpenAISampler(TOKENIZER, SamplingConfig(), OpenAISamplerConfig(base_url=url))


# --- threads and loops ----------------------------------------------------------------------------


def test_it_works_in_a_running_loop_and_in_any_thread() -> None:
    with drawing(StubUpstream(**VLLM)) as sampler:
        prompts = sampler.encode(ROWS)
        expected = sampler.sample(prompts)

        async def in_a_loop() -> list[Group]:
            return sampler.sample(prompts)

        assert asyncio.run(in_a_loop()) == expected
        found: list[list[Group]] = []
        threads = [
            threading.Thread(target=lambda: found.append(sampler.sample(prompts))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 3


def test_progress_is_told_in_the_calling_thread_and_may_stop_it() -> None:
    stub = StubUpstream(delay=0.01)
    threads = set()

    def stopping(count: int) -> None:
        threads.add(threading.current_thread())
        raise KeyboardInterrupt

    with drawing(stub, concurrency=2) as sampler:
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(sampler.encode(ROWS), stopping)
        time.sleep(0.3)  # nothing goes on behind one's back
        assert len(stub.bodies) < 15
    assert threads == {threading.current_thread()}


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with drawing(StubUpstream()) as sampler:
        sampler.encode(ROWS)
        sampler.close()
        sampler.close()
    assert set(threading.enumerate()) == before


def test_it_is_a_sampler_like_the_local_one(tiny_model: Any) -> None:
    """The same prompt ids, and groups of the same form."""
    from bonbon.models.loading import load_policy

    model, tokenizer = load_policy(str(tiny_model), device="cpu")
    local = TransformersSampler(model, tokenizer, SamplingConfig(n=2, max_new_tokens=20))
    with drawing(StubUpstream(**VLLM), {"n": 2, "max_new_tokens": 60}) as sampler:
        prompts = sampler.encode(ROWS)
        assert prompts == local.encode(ROWS)
        assert sampler.sample([]) == local.sample([]) == []
        assert all(prompt.token_ids[0] == BOS for prompt in prompts)
        (group, *_) = sampler.sample([EncodedPrompt("x", "y", (BOS, 5))])
        (mine, *_) = local.sample([EncodedPrompt("x", "y", (BOS, 5))])
        assert group.to_row().keys() == mine.to_row().keys()
        assert group.prompt_token_ids == mine.prompt_token_ids
