"""Locally optimal initialisation at the start of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_rlora.adapters import LoraPair, find_pairs, get_offset
from lightning_rlora.adapters.pairs import base_weight, is_quantised, own_rows
from lightning_rlora.callbacks.initialisation import Initialisation
from lightning_rlora.callbacks.training_batches import Loss, first_batches, precision, quiet, training_step_loss
from lightning_rlora.collectives import average_gradients
from lightning_rlora.errors import UserError
from lightning_rlora.init import LayerStart, locally_optimal_init


class LocallyOptimalInit(Initialisation):
    """Starts the adapters where their tangent spaces hold the most of the loss gradient, once, before the first step.

    Runs 2 (power_steps + 1) passes over the first batches of the training data, with dropout off and the random state
    restored afterwards, and sets every LoRA pair to X0 = alpha U_{1..r} V_{r+1..2r}^T. A resumed run does not repeat
    it: the checkpoint knows that it is done, and holds the offset of the base with the adapter.

    The loss is `training_step`'s, with logging silenced. Where there is none to call (manual optimization), pass
    `loss`. Under 16-mixed precision the passes run in bfloat16, which needs no loss scale.

    Args:
        alpha: All singular values of the start are |alpha|; by default the paper's -0.01 / sqrt(r).
        batches: Number of training batches whose mean gradient is used.
        draws: Times that each of them is used. More than one makes sense where the loss itself is random, as a
            diffusion model's by its noise: each draws anew, and all are the same in every pass.
        oversampling: Extra columns of the sketches beyond 2r.
        power_steps: Power iterations; each costs two more passes.
        offset: `subtract` shifts the base by X0, so that the function is unchanged. `none` leaves the base alone, and
            the function moves by X0, which is orthogonal to the gradient. `auto` subtracts from float32 bases, never
            from quantised ones, and for bfloat16 and float16 bases, where the shift is partly lost to rounding, takes
            what changes the loss less.
        seed: Of the random sketches.
        loss: Loss of a batch, `loss(module, batch)`, in place of `training_step`.

    Attributes:
        starts: One `LayerStart` a layer once it has run.
        loss_before: Mean loss over the batches before.
        loss_after: The same after.
        offset_taken: `subtract` or `none`.
    """

    def __init__(
        self,
        alpha: float | None = None,
        batches: int = 1,
        draws: int = 1,
        oversampling: int = 16,
        power_steps: int = 1,
        offset: Literal["subtract", "none", "auto"] = "auto",
        seed: int = 0,
        loss: Loss | None = None,
    ) -> None:
        if alpha == 0:
            raise UserError("alpha = 0 of LocallyOptimalInit is no point of the manifold: give another size")
        if batches < 1 or draws < 1 or oversampling < 0 or power_steps < 0:
            raise UserError("LocallyOptimalInit needs batches >= 1, draws >= 1, oversampling >= 0 and power_steps >= 0")
        if offset not in ("subtract", "none", "auto"):
            raise UserError(f"unknown offset {offset!r} of LocallyOptimalInit: use subtract, none or auto")
        super().__init__(seed, loss)
        self.alpha = alpha
        self.batches = batches
        self.draws = draws
        self.oversampling = oversampling
        self.power_steps = power_steps
        self.offset = offset
        self.starts: list[LayerStart] = []
        self.offset_taken = ""

    def initialise(self, trainer: Trainer, module: LightningModule) -> None:
        """Run the passes, and keep what they found."""
        loss = self._loss or training_step_loss(module)
        batches = first_batches(trainer, module, self.batches) * self.draws

        def mean_loss(run: Callable[[Tensor], object]) -> float:
            total = 0.0
            for batch in batches:
                with precision(trainer):
                    value = loss(module, batch) / len(batches)
                run(value)
                total += value.item()
            return float(trainer.strategy.reduce(torch.tensor(total, device=module.device), reduce_op="mean"))

        def backward() -> None:
            with isolate_rng():
                mean_loss(Tensor.backward)
            average_gradients(module.parameters())  # all processes start at one point

        @torch.no_grad()
        def evaluate() -> float:
            with isolate_rng():
                return mean_loss(lambda _: None)

        with quiet(module):
            self.loss_before = evaluate()
            self._start(module, backward, evaluate)
            self.loss_after = evaluate()
        rank_zero_info(self.report())

    def _start(self, module: LightningModule, backward: Callable[[], None], evaluate: Callable[[], float]) -> None:
        """Initialise with the offset asked for; for `auto` on a half-precision base, with the better one."""
        pairs = find_pairs(module)
        quantised = any(is_quantised(pair) for pair in pairs)
        subtract = self.offset == "subtract" or (self.offset == "auto" and not quantised)
        measure = self.offset == "auto" and not quantised and any(_is_half(base_weight(p)) for p in pairs)
        # a shift back is not exact in half precision, so the base itself is kept, off the device
        kept = [_base(pair).to("cpu", copy=True) for pair in pairs] if measure else []
        self.starts = locally_optimal_init(
            module,
            backward,
            alpha=self.alpha,
            oversampling=self.oversampling,
            power_steps=self.power_steps,
            subtract=subtract,
            generator=torch.Generator().manual_seed(self.seed),
        )
        if measure:
            change_subtract = abs(evaluate() - self.loss_before)
            shifted = _swap_bases(pairs, kept)
            change_none = abs(evaluate() - self.loss_before)
            subtract = change_subtract <= change_none
            if subtract:
                _swap_bases(pairs, shifted)
            else:
                for pair in pairs:
                    offset = get_offset(pair)
                    assert offset is not None
                    offset.forget()
        self.offset_taken = "subtract" if subtract else "none"

    def report(self) -> str:
        """One paragraph on what was found."""
        shares = [start.captured for start in self.starts]
        least = min(self.starts, key=lambda start: start.captured)
        gaps = sorted(start.gap for start in self.starts)
        return (
            f"Locally optimal initialisation of {len(self.starts)} layers: {100 * sum(shares) / len(shares):.0f} % of "
            f"|gradient|^2 in the tangent spaces on average (least {100 * least.captured:.0f} % in {least.name}), "
            f"median gap {gaps[len(gaps) // 2]:.2f}, alpha {least.alpha:.3g}, offset {self.offset_taken}, loss "
            f"{self.loss_before:.6f} -> {self.loss_after:.6f}"
        )


def _base(pair: LoraPair) -> Tensor:
    """What this process holds of the base weight."""
    return own_rows(base_weight(pair).detach())[0]


def _is_half(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() < 4


@torch.no_grad()
def _swap_bases(pairs: list[LoraPair], others: list[Tensor]) -> list[Tensor]:
    """Put other values into the base weights and return the old ones, off the device."""
    old = []
    for pair, other in zip(pairs, others, strict=True):
        base = _base(pair)
        old.append(base.to("cpu", copy=True))
        base.copy_(other)
    return old
