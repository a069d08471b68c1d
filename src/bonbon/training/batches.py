"""Which groups each process trains on, and what each counts for.

A batch is the same groups whatever the number of processes. It is done in parts, a forward pass
each: its groups, longest first, are dealt out to the processes like cards, and as many rounds as
fit in `max_batch_tokens` make a part. So all processes do as many forward passes, as sharded
weights need, on groups of like length, and nobody waits long.
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

Deal = list[list[int]]  # a part: each process' groups, by their indices


@dataclass(frozen=True)
class Part:
    """One process' groups of a forward pass, by their indices.

    The part's loss is the mean of its groups' losses times `share`. A process that is left without
    a group does another's over again with a share of 0, as all take part in a pass.
    """

    indices: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Processes:
    """How many processes share the work, and which of them this is."""

    count: int = 1
    index: int = 0


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's groups, the one that transformers' `Trainer` has for one process."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def deal(shapes: ArrayLike, max_tokens: int, processes: int = 1) -> list[Deal]:
    """A batch's parts: for each, the indices of the groups that each process takes.

    Every index is in exactly one list. A part's lists are of one length, but in the last part they
    may be shorter by one, or empty, for the later processes.

    Args:
        shapes: (G, 3): a group's tokens of the prompt, its completions, and the tokens of the
            longest completion.
        max_tokens: most tokens of a part in a process.
        processes: how many share the batch.
    """
    prompts, completions, longest = np.asarray(shapes, dtype=np.int64).T
    # With the longest prompt of all, so that no padding takes a part over the limit.
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
    """The batches of an epoch, each as this process' parts.

    Over all processes every group is in exactly one part of a share above 0 an epoch. With these
    shares the average over the processes of the average over `window` batches (or as many as are
    left at an epoch's end) is the mean over all their groups.

    Args:
        shapes: (G, 3), all groups' shapes, in every process; see `deal`.
        batch_size: groups a batch, over all processes; the last batch of an epoch may have fewer.
        max_tokens: most tokens of a part in a process.
        window: batches whose gradients are accumulated.
        seed: of the epochs' orders; None: as they are.
        processes: who shares the work.
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
        """Iterate in the order of this epoch from now on."""
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
    """Groups, taken by the parts that `GroupBatches` yields."""

    def __init__(self, groups: Sequence[SelectedGroup]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, part: Part) -> tuple[list[SelectedGroup], float]:
        return [self.groups[index] for index in part.indices], part.share


class GroupLoader(DataLoader[tuple[list[SelectedGroup], float]]):
    """A data loader over `GroupBatches` that can be told the epoch, as the `Trainer` does."""

    def set_epoch(self, epoch: int) -> None:
        """Load in the order of this epoch from now on."""
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
