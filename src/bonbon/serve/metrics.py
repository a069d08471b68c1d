"""The metrics of `/metrics`, in Prometheus' text format."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bonbon.serve.admission import Admission
from bonbon.serve.backend import Answer

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_REWARDS = (-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Metrics:
    """The server's metrics; `create_metrics` has their names and meanings."""

    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram
    rejected: Counter
    generated: Counter
    drawn: Counter
    failed: Counter
    reward: Histogram

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        if status == 429:
            self.rejected.inc()

    def count_answer(self, answer: Answer) -> None:
        """Count a job's cost and observe its answer's reward."""
        self.generated.inc(answer.cost.generated)
        self.drawn.inc(answer.generation.group.n)
        self.failed.inc(answer.failed)
        if answer.generation.reward is not None:
            self.reward.observe(answer.generation.reward)


def create_metrics(admission: Admission) -> Metrics:
    """Create the metrics in a registry of their own."""
    registry = CollectorRegistry()
    waiting = Gauge("bonbon_queue_length", "Jobs that wait", registry=registry)
    waiting.set_function(lambda: admission.waiting)
    running = Gauge("bonbon_jobs_running", "Jobs that run", registry=registry)
    running.set_function(lambda: admission.running)
    return Metrics(
        registry,
        Counter("bonbon_requests", "Requests", ["route", "status"], registry=registry),
        Histogram(
            "bonbon_request_seconds",
            "Time from a request's first byte to its answer's last",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        ),
        Counter("bonbon_rejected", "Requests refused by a full queue", registry=registry),
        Counter(
            "bonbon_tokens_generated",
            "Tokens drawn, those of rejected candidates included",
            registry=registry,
        ),
        Counter("bonbon_candidates_drawn", "Candidates that arrived", registry=registry),
        Counter("bonbon_candidates_failed", "Candidates that did not arrive", registry=registry),
        Histogram("bonbon_chosen_reward", "Rewards of chosen", buckets=_REWARDS, registry=registry),
    )
