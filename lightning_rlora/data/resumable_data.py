"""What all data modules share: training batches that go on where the trainer stands."""

from abc import ABC
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from lightning_rlora.data.place import place_of, settle
from lightning_rlora.errors import UserError


class ResumableData(LightningDataModule, ABC):
    """Batches of every epoch that depend on nothing but the data, the seed and the epoch's number.

    Args:
        batch_size: Rows per batch and process.
        num_workers: Processes that make batches.
        seed: Seeds whatever is drawn; nothing is drawn from the global random number generators.

    Raises:
        UserError: An argument is out of its range.
    """

    def __init__(self, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        for name, least in {"batch_size": 1, "num_workers": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def _training(self) -> dict[str, Any]:
        """What a loader of training batches is made with."""
        if self.trainer:
            settle(self.trainer)
        return {
            "place": partial(place_of, self.trainer) if self.trainer else lambda: (0, 0),
            "seed": self.seed,
            "num_workers": self.num_workers,
            **self._processes(),
        }

    def _processes(self) -> dict[str, Any]:
        """This process's place among those that share the data (not all do under tensor parallelism)."""
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return {"rank": shares["rank"], "world_size": shares["num_replicas"]}

    def _random(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, purpose])

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer else None
