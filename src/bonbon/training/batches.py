"""Batches: which groups each process trains on, and with which weight.

A batch has the same groups for any number of processes. It is divided into parts, one forward pass
each: its groups, longest first, are dealt to the processes in turn, and as many rounds as fit in
`max_batch_tokens` make a part. So all processes do the same number of forward passes, as sharded
weights need, on groups of similar length, and wait little for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset, Sampler

from bonbon.models.group_logprobs import group_rows
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


def default_batch_tokens(device: torch.device) -> int:
    """Return the default of `max_batch_tokens` on a device.

    A CPU is fastest while a forward pass fits its caches; elsewhere memory sets the limit.
    """
    return 4096 if device.type == "cpu" else 32_768


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return an epoch's order of the groups, as transformers' `Trainer` has it in one process."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def deal(shapes: ArrayLike, max_tokens: int, processes: int = 1) -> list[Deal]:
    """Divide a batch into parts: for each, the indices of the groups that each process takes.

    Every index is in exactly one list. The lists of a part have the same length; only in the last
    part those of later processes may be shorter by one.

    Args:
        shapes: (G, 3): of each group the tokens of the prompt, the completions, and the tokens of
            the longest completion.
        max_tokens: the most tokens of a part in one process, with padding.
        processes: the number of processes that share the batch.
    """
    prompts, completions, longest = np.asarray(shapes, dtype=np.int64).T
    # Counted with the longest prompt, so that a part with its padding stays within the limit.
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
    shares are such that the mean over processes of the mean over `window` batches (or the fewer
    left at an epoch's end) is the mean over all their groups.

    Args:
        shapes: (G, 3), the shapes of all groups, in every process; see `deal`.
        batch_size: groups in a batch, over all processes; an epoch's last batch may have fewer.
        max_tokens: the most tokens of a part in one process.
        window: the number of batches whose gradients are accumulated.
        seed: for the epochs' random orders; None: the groups' own order.
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
        """Set the epoch whose order the next iterations follow."""
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
    """A data set of groups that is indexed by the parts of `GroupBatches`."""

    def __init__(self, groups: Sequence[SelectedGroup]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, part: Part) -> tuple[list[SelectedGroup], float]:
        return [self.groups[index] for index in part.indices], part.share


class GroupLoader(DataLoader[tuple[list[SelectedGroup], float]]):
    """A data loader over `GroupBatches` with a method that the `Trainer` sets the epoch by."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iterations follow."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


@dataclass(frozen=True)
class GroupCollator:
    """Converts a batch's parts, each some groups and the share of their mean loss, to tensors.

    With these shares the parts' losses add up to the batch's mean loss.
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
            # In double precision, so that rewards which differ in the last digits do not tie.
            "rewards": torch.tensor([group.rewards for group in groups], dtype=torch.float64),
            "share": torch.tensor(share, dtype=torch.float64),
        }
