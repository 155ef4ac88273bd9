"""What the callbacks that start the adapters have in common: once, before the first step, and never after a resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlora.adapters import find_pairs, track_offsets
from lightning_rlora.callbacks.training_batches import Loss


class Initialisation(Callback, ABC):
    """Starts the adapters once, before the first step.

    Args:
        seed: Of whatever is random.
        loss: Loss of a batch, `loss(module, batch)`, in place of `training_step`.

    Attributes:
        done: Whether it has run, in this run or in the one that was resumed.
        loss_before: Loss over the first training batches before.
        loss_after: The same after.
    """

    def __init__(self, seed: int, loss: Loss | None) -> None:
        self.seed = seed
        self._loss = loss
        self.done = False
        self.loss_before = float("nan")
        self.loss_after = float("nan")

    @abstractmethod
    def initialise(self, trainer: Trainer, module: LightningModule) -> None:
        """Set the factors, and shift the bases if need be."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Track the offset of every layer while the base is pristine, so that a checkpoint can restore it."""
        track_offsets(find_pairs(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run, unless the run was resumed."""
        if not self.done:
            self.initialise(trainer, pl_module)
            self.done = True

    def state_dict(self) -> dict[str, Any]:
        """What a resume must know: that the adapters are initialised."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not run again after a resume."""
        self.done = state_dict["done"]
