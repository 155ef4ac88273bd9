"""Another start than PEFT's default, at the beginning of training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_rlora.adapters import (
    LoraPair,
    Passes,
    Start,
    check_shiftable,
    find_adapted,
    find_pairs,
    refuse_trained,
    renew_magnitude,
    subtract_start,
)
from lightning_rlora.adapters.gauge import start_factors
from lightning_rlora.callbacks.initialisation import Initialisation
from lightning_rlora.callbacks.training_batches import Loss, first_batches, precision, quiet, training_step_loss
from lightning_rlora.collectives import take_first
from lightning_rlora.errors import UserError
from lightning_rlora.optim.fixed_rank import FixedRankOptimizer


class AdapterInit(Initialisation):
    """Sets the adapters to a start, once, before the first step; a resumed run does not repeat it.

    A start whose product is not zero is taken off the base, W' = W - X0, so that the function is unchanged. The
    checkpoint holds X0 with the adapter: a resume finds the very same base again from the pristine one, and the
    exported adapter, of rank 2r, fits the pristine base. On bfloat16 and float16 bases part of the shift is lost to
    rounding; the loss before and after is reported.

    Starts that need data run over the first training batches, with dropout off and logging silenced; the random state
    is restored afterwards. Of several processes LoRAGA takes the mean gradient, EVA and CorDA the first one's batches.
    DoRA's magnitudes become the norms of the start. Where a product is zero and its optimizer is one on the manifold,
    the zero factor gets the optimizer's own tiny start.

    Args:
        start: `Stiefel`, `PiSSA`, `OLoRA`, `LoftQ`, `LoRAGA`, `EVA` or `CorDA`.
        seed: Of whatever is random in the start.
        loss: Loss of a batch, `loss(module, batch)`, in place of `training_step`.

    Attributes:
        loss_before: Loss of the first training batch before.
        loss_after: The same after.
    """

    def __init__(self, start: Start, seed: int = 0, loss: Loss | None = None) -> None:
        super().__init__(seed, loss)
        self.start = start

    def initialise(self, trainer: Trainer, module: LightningModule) -> None:
        """Run the start in every process, and take over the first one's."""
        model = find_adapted(module)
        pairs = find_pairs(model)
        name = type(self.start).__name__
        refuse_trained(pairs, name)
        if self.start.shifts_base:
            check_shiftable(model, pairs)
        loss_of = self._loss or training_step_loss(module)
        batches = first_batches(trainer, module, max(1, self.start.batches))

        def loss(batch: Any) -> Tensor:
            with precision(trainer), isolate_rng():
                return loss_of(module, batch)

        def forward(batch: Any) -> object:
            with precision(trainer), torch.no_grad():
                return model(**batch)

        @torch.no_grad()
        def measured() -> float:
            torch.manual_seed(self.seed)  # a loss that draws noise draws the same before and after
            return float(trainer.strategy.reduce(loss(batches[0]), reduce_op="mean"))

        with quiet(module), isolate_rng():
            self.loss_before = measured()
            torch.manual_seed(self.seed)  # PEFT's starts draw from the global generator
            passes = Passes(batches[: self.start.batches], forward, loss)
            error = None
            try:
                self.start.set_factors(model, pairs, passes, torch.Generator().manual_seed(self.seed))
            except UserError as refused:
                error = refused
            if not trainer.strategy.reduce_boolean_decision(error is None):
                raise error or UserError(f"the start {name} failed in another process, which says why")
            self._settle(trainer, pairs)
            self.loss_after = measured()
        for parameter in module.parameters():
            parameter.grad = None
        rank_zero_info(f"{name} start of {len(pairs)} layers: loss {self.loss_before:.6f} -> {self.loss_after:.6f}")

    @torch.no_grad()
    def _settle(self, trainer: Trainer, pairs: list[LoraPair]) -> None:
        """Make every process start where the first one does, and fit what depends on the factors to them."""
        generator = torch.Generator().manual_seed(self.seed)
        on_manifold = _factors_on_manifold(trainer)
        take_first(factor for pair in pairs for factor in (pair.a, pair.b))
        for pair in pairs:
            if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
                raise UserError(f"the start of layer {pair.name} is not finite: look for bad input data")
            if id(pair.a) in on_manifold:
                start_factors(pair.b, pair.a, pair.scaling, generator)  # else the first step would do so, and only that
            if self.start.shifts_base:
                subtract_start(pair)
            renew_magnitude(pair)


def _factors_on_manifold(trainer: Trainer) -> set[int]:
    """The identities of the factors that a Riemannian optimizer holds."""
    return {
        id(factor)
        for optimizer in trainer.optimizers
        if isinstance(optimizer, FixedRankOptimizer)
        for group in optimizer.param_groups
        if group["algorithm"] != "adamw"
        for factor in group["params"]
    }
