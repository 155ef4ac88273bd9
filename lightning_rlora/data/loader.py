"""The order of training batches.

The batches of an epoch are a pure function of (seed, epoch, rank). A loader keeps no place of its own but asks for it
(see ``place.py``), so walking over one changes nothing: a callback may look at the coming batches without taking them
away.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_rlora.data.examples import Example, Examples

T = TypeVar("T")
Rows = Sequence[Sequence[Example]]
Collate = Callable[[Rows], dict[str, Any]]
Place = Callable[[], tuple[int, int]]  # (epoch, batches of it that were trained on)


class ResumableLoader(ABC):
    """What all loaders share: they start where the trainer stands, and draw nothing from the global RNG.

    ``state_dict`` and ``load_state_dict`` make Lightning see a resumable loader. They carry what the order depends on,
    so that a run resumed on other data is told.

    Args:
        place: Tells the epoch and how many of its batches are done.
        fingerprint: What the order depends on, beside the seed and the number of processes.
        seed: Seeds the order.
        num_workers: Processes that make batches.
        rank: This process.
        world_size: Number of processes that share the data.
    """

    def __init__(
        self, place: Place, fingerprint: dict[str, int], seed: int, num_workers: int, rank: int, world_size: int
    ) -> None:
        self.place = place
        self.fingerprint = {"seed": seed, **fingerprint, "number of processes": world_size}
        self.seed = seed
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def batches(self, epoch: int, done: int) -> DataLoader:
        """Gives the batches of an epoch but the first ``done``."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator, so that the place is read when the first batch is: a module that asks the trainer for its number
        # of steps makes Lightning call this before it restores a checkpoint.
        with _quiet_fork():
            batches = iter(self.batches(*self.place()))
        yield from batches

    def state_dict(self) -> dict[str, int]:
        """What the order of the batches depends on."""
        return dict(self.fingerprint)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warns if the order is not the one of the interrupted run."""
        changed = [name for name, value in self.fingerprint.items() if state.get(name) != value]
        if changed:
            rank_zero_warn(
                f"resuming with other training data than the checkpoint's ({', '.join(changed)} changed): the rest of"
                " this epoch holds other batches than the interrupted run would have seen"
            )

    def generator(self) -> torch.Generator:
        """A generator of its own for torch's DataLoader, which would otherwise take a number from the global one."""
        return torch.Generator().manual_seed(self.seed)


class RowLoader(ResumableLoader):
    """Loads batches of rows that are all in memory.

    Args:
        examples: The examples.
        rows: Which examples each row holds.
        batch_size: Rows of one batch of one process.
        collate: Makes a batch of rows.
        place: Tells the epoch and how many of its batches are done.
        shuffle: Whether each epoch has an order of its own.
        seed: Seeds the order.
        num_workers: Processes that make batches.
        rank: This process.
        world_size: Number of processes; they take turns, and all have equally many batches. In a shuffled order the
            first rows are repeated until all have equally many rows, too; in the given one, of which metrics are taken,
            only where a process would have an empty batch.
    """

    def __init__(
        self,
        examples: Examples,
        rows: Sequence[Sequence[int]],
        batch_size: int,
        collate: Collate,
        place: Place = lambda: (0, 0),
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        fingerprint = {
            "rows": len(rows),
            "batch size": batch_size,
            "data": examples.checksum,
        }
        super().__init__(place, fingerprint, seed, num_workers, rank, world_size)
        self.dataset = RowDataset(examples, rows)
        self.batch_size = batch_size
        self.collate = collate
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Number of batches of every epoch, for one process."""
        return -(-len(self.dataset) // (self.batch_size * self.world_size))

    def batches(self, epoch: int, done: int) -> DataLoader:
        """Gives the batches of an epoch but the first ``done``, without making these."""
        count = len(self.dataset)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        if self.shuffle or count // self.world_size < len(self):
            order = np.resize(order, -(-count // self.world_size) * self.world_size)
        mine = order[self.rank :: self.world_size]
        indices = [mine[i : i + self.batch_size].tolist() for i in range(0, len(mine), self.batch_size)]
        if len(indices) < len(self):
            indices = [part.tolist() for part in np.array_split(mine, len(self))]
        return DataLoader(
            self.dataset,
            batch_sampler=indices[done:],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=self.generator(),
        )


class StreamLoader(ResumableLoader):
    """Loads batches from rows that are read, tokenised and packed as they are needed.

    Every process reads the whole stream and takes its turn of the batches, so all have equally many. A resumed run
    reads its epoch from the start again and passes over what is done: exact, and as slow as that sounds.

    Args:
        rows: Gives the rows of an epoch.
        batch_size: Rows of one batch of one process.
        collate: Makes a batch of rows.
        place: Tells the epoch and how many of its batches are done.
        seed: Seeds the order.
        num_workers: 0 reads in the training process, otherwise one worker reads ahead (several could only repeat it).
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        rows: Callable[[int], Iterable[Sequence[Example]]],
        batch_size: int,
        collate: Collate,
        place: Place = lambda: (0, 0),
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(place, {"batch size": batch_size}, seed, num_workers, rank, world_size)
        self.rows = rows
        self.batch_size = batch_size
        self.collate = collate

    def batches(self, epoch: int, done: int) -> DataLoader:
        """Gives the batches of an epoch but the first ``done``."""
        dataset = StreamDataset(lambda: islice(self._turns(epoch), done, None))
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=self.collate,
            num_workers=min(self.num_workers, 1),
            generator=self.generator(),
        )

    def _turns(self, epoch: int) -> Iterator[Rows]:
        """Yields this process's batches; several processes leave out the rows at the end that do not go round."""
        rows = iter(self.rows(epoch))
        together = self.batch_size * self.world_size
        while group := list(islice(rows, together)):
            if self.world_size == 1 or len(group) == together:
                yield group[self.rank :: self.world_size]


def shuffled(items: Iterable[T], buffer_size: int, generator: np.random.Generator) -> Iterator[T]:
    """Shuffles a stream: each item waits in a buffer until a later one happens to push it out."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        i = int(generator.integers(buffer_size))
        yield buffer[i]
        buffer[i] = item
    for i in generator.permutation(len(buffer)):
        yield buffer[i]


class RowDataset(Dataset):
    """Rows of examples by number."""

    def __init__(self, examples: Examples, rows: Sequence[Sequence[int]]) -> None:
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Example]:
        """The examples of one row."""
        return [self.examples[i] for i in self.rows[row]]


class StreamDataset(IterableDataset):
    """A stream as torch wants it."""

    def __init__(self, batches: Callable[[], Iterator[Rows]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Rows]:
        return self._batches()


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Lets tokenizers know before a worker is forked that its threads do not come along; else it prints a warning."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
