"""Loads batches of pictures in an order that is planned for each epoch."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_rlora.data.loader import Place, ResumableLoader
from lightning_rlora.data.pictures import Pictures, View, picture_batch
from lightning_rlora.errors import UserError

Plan = Callable[[int], list[list[View]]]
"""Gives the batches of an epoch; every epoch has equally many."""


class ImageLoader(ResumableLoader):
    """Loads batches of views of pictures, which are decoded as they are needed.

    Args:
        pictures: The pictures.
        plan: Gives the batches of an epoch, those of all processes.
        place: Tells the epoch and how many of its batches are done.
        seed: What the plan was seeded with.
        num_workers: Processes that make batches.
        rank: This process.
        world_size: Number of processes; they take turns, and the first batches are repeated until all have equally
            many.
    """

    def __init__(
        self,
        pictures: Pictures,
        plan: Plan,
        place: Place = lambda: (0, 0),
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length = -(-len(plan(0)) // world_size)
        fingerprint = {
            "images": len(pictures),
            "number of batches": self.length,
            "data": pictures.checksum,
        }
        super().__init__(place, fingerprint, seed, num_workers, rank, world_size)
        self.pictures = pictures
        self.plan = plan

    def __len__(self) -> int:
        """Number of batches of every epoch, for one process."""
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def batches(self, epoch: int, done: int) -> DataLoader:
        """Gives the batches of an epoch but the first ``done``, without making these."""
        every = self.plan(epoch)
        mine = [every[(turn * self.world_size + self.rank) % len(every)] for turn in range(done, self.length)]
        return DataLoader(
            self.pictures,
            batch_sampler=mine,
            collate_fn=picture_batch,
            num_workers=self.num_workers,
            generator=self.generator(),
        )
