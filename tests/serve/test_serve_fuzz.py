"""`bonbon serve` against its own OpenAPI document, with requests that schemathesis makes up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from bonbon.serve.app import create_app, create_service
from bonbon.serve.config import ServeConfig
from support.fake_backend import KEY, FakeBackend

OPERATIONS = {
    ("/v1/chat/completions", "POST"): 40,
    ("/v1/completions", "POST"): 40,
    ("/v1/models", "GET"): 5,
    ("/v1/models/{model}", "GET"): 20,
    ("/health", "GET"): 5,
    ("/metrics", "GET"): 5,
}
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(params=[(), ("response_format", "min_p")], ids=["local", "upstream"])
def described(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("BONBON_API_KEY", KEY)
    service = create_service(ServeConfig(), FakeBackend(), frozenset(request.param))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service), headers=HEADERS)


def test_all_operations_are_fuzzed(described: Any) -> None:
    found = {(op.ok().path, op.ok().method.upper()) for op in described.get_all_operations()}
    assert found == OPERATIONS.keys()


def made_to_fit(body: dict[str, Any]) -> dict[str, Any]:
    """The body without what is wrong though each field fits the document."""
    wrong = {"model"}  # made-up names
    if not body.get("stream"):
        wrong.add("stream_options")
    if not body.get("logprobs"):
        wrong.add("top_logprobs")
    if body.get("max_tokens"):
        wrong.add("max_completion_tokens")
    if (body.get("best_of") or 1) < (body.get("n") or 1):
        wrong.add("best_of")
    kept = {name: value for name, value in body.items() if name not in wrong}
    asked = body.get("strategy")
    if asked is not None:  # made-up settings, and one that has to be there
        name = asked if isinstance(asked, str) else asked["name"]
        kept["strategy"] = {"name": name} | ({"price": 0.1} if name == "adaptive_n" else {})
    return kept


def send_made_up(described: Any, path: str, method: str, mode: GenerationMode) -> Counter[int]:
    """Send what fits the document, or what does not, and check the replies; how many of each."""
    statuses: Counter[int] = Counter()

    @settings(
        deadline=None,
        max_examples=OPERATIONS[path, method],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = made_to_fit(case.body)
        reply = case.call_and_validate(headers=HEADERS)
        statuses[reply.status_code] += 1

    holds()
    return statuses


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_requests_that_fit(described: Any, path: str, method: str) -> None:
    statuses = send_made_up(described, path, method, GenerationMode.POSITIVE)
    if path != "/v1/models/{model}":
        assert set(statuses) == {200}


@pytest.mark.parametrize(("path", "method"), [key for key in OPERATIONS if key[1] == "POST"])
def test_requests_that_do_not_fit(described: Any, path: str, method: str) -> None:
    statuses = send_made_up(described, path, method, GenerationMode.NEGATIVE)
    # What is wrong may be a header that nobody reads; the checks know what has to be refused.
    assert statuses[400] > statuses.total() / 4, statuses
