"""Another start than PEFT's default, at the beginning of training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_rlora.adapters import (
    LoraPair,
    Passes,
    Start,
    find_adapted,
    find_pairs,
    get_offset,
    matrix,
    refuse_trained,
    track_offsets,
)
from lightning_rlora.adapters.pairs import with_shared_base
from lightning_rlora.callbacks.training_batches import Loss, first_batches, precision, quiet, training_step_loss
from lightning_rlora.errors import UserError


class AdapterInit(Callback):
    """Sets the adapters to a start, once, before the first step; a resumed run does not repeat it.

    A start whose product is not zero is taken off the base, W' = W - X0, so that the function is unchanged. The
    checkpoint holds X0 with the adapter: a resume finds the very same base again from the pristine one, and the
    exported adapter, of rank 2r, fits the pristine base. On bfloat16 and float16 bases part of the shift is lost to
    rounding; the loss before and after is reported.

    Starts that need data run over the first training batches, those of the first process, with dropout off and logging
    silenced; the random state is restored afterwards.

    Args:
        start: `Stiefel`, `PiSSA`, `OLoRA`, `LoftQ`, `LoRAGA`, `EVA` or `CorDA`.
        seed: Of random factors.
        loss: Loss of a batch, `loss(module, batch)`, in place of `training_step`.

    Attributes:
        loss_before: Loss of the first training batch before.
        loss_after: The same after.
    """

    def __init__(self, start: Start, seed: int = 0, loss: Loss | None = None) -> None:
        self.start = start
        self.seed = seed
        self._loss = loss
        self.done = False
        self.loss_before = float("nan")
        self.loss_after = float("nan")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Track the offset of every layer while the base is pristine, so that a checkpoint can restore it."""
        track_offsets(find_pairs(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """What a resume must know: that the adapters are initialised."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not run again after a resume."""
        self.done = state_dict["done"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run, unless the run was resumed."""
        if self.done:
            return
        model = find_adapted(pl_module)
        pairs = find_pairs(model)
        name = type(self.start).__name__
        refuse_trained(pairs, name)
        if self.start.shifts_base and (shared := with_shared_base(model, pairs)):
            raise UserError(
                f"layer {shared[0].name} shares its base weight with another layer, so it cannot be shifted for one of "
                "them: leave it out of target_modules"
            )
        loss_of = self._loss or training_step_loss(pl_module)
        batches = first_batches(trainer, pl_module, max(1, self.start.batches))

        def loss(batch: Any) -> Tensor:
            with precision(trainer):
                return loss_of(pl_module, batch)

        def forward(batch: Any) -> object:
            with precision(trainer), torch.no_grad():
                return model(**batch)

        @torch.no_grad()
        def measured() -> float:
            return float(trainer.strategy.reduce(loss(batches[0]), reduce_op="mean"))

        with quiet(pl_module), isolate_rng():
            self.loss_before = measured()
            passes = Passes(batches[: self.start.batches], forward, loss)
            self.start.set_factors(model, pairs, passes, torch.Generator().manual_seed(self.seed))
            self._settle(trainer, pairs)
            self.loss_after = measured()
        for parameter in pl_module.parameters():
            parameter.grad = None
        self.done = True
        rank_zero_info(f"{name} start of {len(pairs)} layers: loss {self.loss_before:.6f} -> {self.loss_after:.6f}")

    @torch.no_grad()
    def _settle(self, trainer: Trainer, pairs: list[LoraPair]) -> None:
        """Make every process start where the first one does, and take the start off the base."""
        for pair in pairs:
            for factor in (pair.a, pair.b):
                factor.copy_(trainer.strategy.broadcast(factor.detach()))
                if not factor.isfinite().all():
                    raise UserError(f"the start of layer {pair.name} is not finite: look for bad input data")
            if self.start.shifts_base:
                offset = get_offset(pair)
                assert offset is not None
                offset.subtract(pair.scaling * matrix(pair.b), matrix(pair.a))
