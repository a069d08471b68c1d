"""A group: one prompt with its n completions, and the figures of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

Message = dict[str, str]


Prompt = str | list[Message]


def as_text(prompt: Prompt) -> str:
    """Convert a prompt to one text; of several messages, a line `role: content` for each."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Group:
    """One prompt and its n completions; all tuples with a value for each completion have length n.

    Raises ValueError when the lengths differ.
    """

    prompt_id: str
    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    completions: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]
    finish_reasons: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, Sequence[Any]] = {
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "finish_reasons": self.finish_reasons,
            **self.metrics,
        }
        if self.rewards is not None:
            columns["rewards"] = self.rewards
        for name, values in columns.items():
            if len(values) != self.n:
                raise ValueError(
                    f"group {self.prompt_id}: {len(values)} {name} for {self.n} completions"
                )

    @property
    def n(self) -> int:
        """The number of completions."""
        return len(self.completions)

    def lengths(self) -> tuple[int, ...]:
        """Return each completion's length in tokens, a drawn end token included."""
        return tuple(len(ids) for ids in self.token_ids)

    def part(self, start: int, stop: int) -> Group:
        """Return the group of the completions start..stop−1."""
        return self.take(range(self.n)[start:stop])

    def take(self, indices: Sequence[int]) -> Group:
        """Return the group of these completions, in this order; repeats are allowed."""
        return replace(
            self,
            completions=tuple(self.completions[i] for i in indices),
            token_ids=tuple(self.token_ids[i] for i in indices),
            logprobs=tuple(self.logprobs[i] for i in indices),
            finish_reasons=tuple(self.finish_reasons[i] for i in indices),
            rewards=None if self.rewards is None else tuple(self.rewards[i] for i in indices),
            metrics={name: tuple(v[i] for i in indices) for name, v in self.metrics.items()},
        )

    def with_rewards(self, rewards: Iterable[float]) -> Group:
        """Return the same group with these rewards."""
        return replace(self, rewards=tuple(float(reward) for reward in rewards))

    def with_metric(self, name: str, values: Iterable[float]) -> Group:
        """Return the same group with one more metric, one value for each completion."""
        figures = tuple(float(value) for value in values)
        return replace(self, metrics={**self.metrics, name: figures})

    def to_row(self) -> dict[str, Any]:
        """Convert the group to a row of the Parquet table."""
        return {
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "completions": self.completions,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "rewards": self.rewards,
            "finish_reasons": self.finish_reasons,
            "metrics": [{"name": k, "values": values} for k, values in self.metrics.items()],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Group:
        """Build a group from a row of the Parquet table (or of `datasets.Dataset`)."""
        rewards = row.get("rewards")
        return cls(
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            prompt_token_ids=tuple(row["prompt_token_ids"]),
            completions=tuple(row["completions"]),
            token_ids=tuple(tuple(ids) for ids in row["token_ids"]),
            logprobs=tuple(row["logprobs"]),
            finish_reasons=tuple(row["finish_reasons"]),
            rewards=None if rewards is None else tuple(rewards),
            metrics={item["name"]: tuple(item["values"]) for item in row.get("metrics") or []},
        )


def joined(groups: Sequence[Group]) -> Group:
    """Join scored groups of one prompt to one, in this order; metrics are left out."""
    return replace(
        groups[0],
        completions=tuple(text for group in groups for text in group.completions),
        token_ids=tuple(ids for group in groups for ids in group.token_ids),
        logprobs=tuple(logprob for group in groups for logprob in group.logprobs),
        finish_reasons=tuple(reason for group in groups for reason in group.finish_reasons),
        rewards=tuple(reward for group in groups for reward in group.rewards or ()),
        metrics={},
    )


class Groups(Sequence[Group]):
    """A read-only sequence of groups with the provenance they were stored with."""

    def __init__(self, groups: Sequence[Group], provenance: Mapping[str, Any] | None = None):
        self._groups = list(groups)
        self.provenance: dict[str, Any] = dict(provenance or {})

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Groups: ...
    def __getitem__(self, index: int | slice) -> Group | Groups:
        if isinstance(index, slice):
            return Groups(self._groups[index], self.provenance)
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)
