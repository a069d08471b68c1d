"""Batches of groups, and their distribution over processes.

A batch has the same groups for any number of processes. It is processed in parts, one forward pass
each: its groups, longest first, are dealt to the processes like cards, and as many rounds as fit in
`max_batch_tokens` make a part. So all processes do the same number of forward passes, which sharded
weights need, on groups of similar length, and none waits long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset, Sampler

from bonbon.models.group_logprobs import (
    group_rows,
)
from bonbon.models.padding import token_batches
from bonbon.objectives.selection import SelectedGroup
from bonbon.training.arguments import BoNBoNConfig as BoNBoNConfig

Deal = list[list[int]]  # a part: the indices of each process' groups


@dataclass(frozen=True)
class Part:
    """One process' groups of a forward pass, by their indices.

    The part's loss is the mean of its groups' losses times `share`. A process without a group
    repeats another's with a share of 0, since all processes take part in every pass.
    """

    indices: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Processes:
    """The number of processes that share the work, and the index of this one."""

    count: int = 1
    index: int = 0


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's groups: that of transformers' `Trainer` in one process."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def deal(shapes: ArrayLike, max_tokens: int, processes: int = 1) -> list[Deal]:
    """Divide a batch into parts: for each, the indices of each process' groups.

    Every index is in exactly one list. A part's lists have equal length; only in the last part may
    those of later processes be shorter by one, or empty.

    Args:
        shapes: (G, 3), for each group: tokens of the prompt, number of completions, tokens of the
            longest completion.
        max_tokens: most tokens of a part in a process.
        processes: the number that share the batch.
    """
    prompts, completions, longest = np.asarray(shapes, dtype=np.int64).T
    # Counted with the longest prompt of all, so that padding cannot exceed the limit.
    lengths = completions * (prompts.max() + longest)
    order = np.argsort(-lengths, kind="stable").tolist()
    rounds = [order[start : start + processes] for start in range(0, len(order), processes)]
    return [
        [
            [rounds[r][process] for r in part if process < len(rounds[r])]
            for process in range(processes)
        ]
        for part in token_batches(rounds, [int(lengths[first]) for first, *_ in rounds], max_tokens)
    ]


class GroupBatches(Sampler[list[Part]]):
    """A sampler of an epoch's batches, each as this process' parts.

    In an epoch every group is in exactly one part with a share above 0, over all processes. The
    loss averaged over `window` batches (or those left at an epoch's end) and over the processes is
    then the mean over all their groups.

    Args:
        shapes: (G, 3), all groups' shapes, in every process; see `deal`.
        batch_size: groups a batch, over all processes; the last batch of an epoch may have fewer.
        max_tokens: most tokens of a part in a process.
        window: batches whose gradients are accumulated.
        seed: of the epochs' orders; None: the groups' own order.
        processes: the processes that share the work.
        drop_last: leave out the last batch where it has fewer groups.
    """

    def __init__(
        self,
        shapes: ArrayLike,
        batch_size: int,
        max_tokens: int,
        *,
        window: int = 1,
        seed: int | None = None,
        processes: Processes = Processes(),
        drop_last: bool = False,
    ) -> None:
        self.shapes = np.asarray(shapes)
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.window = window
        self.seed = seed
        self.processes = processes
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.shapes), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[Part]]:
        order = np.arange(len(self.shapes))
        if self.seed is not None:
            order = epoch_order(len(order), self.seed, self.epoch)
        size = self.batch_size
        batches = [order[size * b : size * (b + 1)] for b in range(len(self))]
        for start in range(0, len(batches), self.window):
            window = batches[start : start + self.window]
            weight = len(window) * self.processes.count / sum(map(len, window))
            for batch in window:
                yield list(self._parts(batch, weight))

    def _parts(self, batch: np.ndarray, weight: float) -> Iterator[Part]:
        dealt = deal(self.shapes[batch], self.max_tokens, self.processes.count)
        for part in dealt:
            own = part[self.processes.index]
            filler = part[0][-1:]
            yield Part(tuple(batch[own or filler].tolist()), weight * len(own))


class PartsDataset(Dataset[tuple[list[SelectedGroup], float]]):
    """A dataset of groups, indexed by the parts that `GroupBatches` yields."""

    def __init__(self, groups: Sequence[SelectedGroup]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, part: Part) -> tuple[list[SelectedGroup], float]:
        return [self.groups[index] for index in part.indices], part.share


class GroupLoader(DataLoader[tuple[list[SelectedGroup], float]]):
    """A data loader over `GroupBatches` with the `set_epoch` that the `Trainer` calls."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


@dataclass(frozen=True)
class GroupCollator:
    """Groups to tensors: a batch of parts, each some groups with what their mean loss counts for.

    So the parts' losses add up to the batch's mean, whatever the parts are.
    """

    pad_id: int

    def __call__(
        self, parts: Sequence[tuple[Sequence[SelectedGroup], float]]
    ) -> dict[str, list[dict[str, torch.Tensor]]]:
        return {"parts": [self._part(groups, share) for groups, share in parts]}

    def _part(self, groups: Sequence[SelectedGroup], share: float) -> dict[str, torch.Tensor]:
        rows = group_rows(
            [group.prompt_token_ids for group in groups],
            [group.completions for group in groups],
            self.pad_id,
        )
        return vars(rows) | {
            "ref_logps": torch.tensor([group.ref_logps for group in groups]),
            # In double precision, or rewards that differ in the last digits would tie.
            "rewards": torch.tensor([group.rewards for group in groups], dtype=torch.float64),
            "share": torch.tensor(share, dtype=torch.float64),
        }
