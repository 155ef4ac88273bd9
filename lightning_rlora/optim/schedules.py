"""Learning-rate schedules over a whole run: warm up, then decay to zero."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_rlora.errors import UserError


class LinearWithWarmup(LambdaLR):
    """Rise linearly over the first steps, then fall linearly to zero at the last.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup: Share of the run, from 0 to below 1, over which the rate rises.
        total_steps: Number of optimizer steps of the run. In the configuration of a module of this package it is left
            out: the module fills in the trainer's number.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.1, total_steps: int | None = None) -> None:
        if not 0 <= warmup < 1:
            raise UserError(f"warmup = {warmup} is a share of the run: give a number from 0 to below 1")
        self.warmup = warmup
        self.total_steps = total_steps
        super().__init__(optimizer, self._multiplier)

    def set_total_steps(self, total_steps: int) -> None:
        """Fill in the length of the run, before its first step."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._multiplier(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _multiplier(self, step: int) -> float:
        if self.total_steps is None:
            if step > 0:
                raise UserError(f"{type(self).__name__} was not told the number of steps: give it total_steps")
            return 0.0  # until the module tells it, before the first step
        rise = self.warmup * self.total_steps
        if step < rise:
            return (step + 1) / (rise + 1)
        return self._decay(min(1.0, (step - rise) / max(1.0, self.total_steps - rise)))

    def _decay(self, progress: float) -> float:
        """From 1 at the end of the warm-up to 0 at the end of the run."""
        return 1 - progress


class CosineWithWarmup(LinearWithWarmup):
    """Rise linearly over the first steps, then fall along half a cosine to zero at the last.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup: Share of the run, from 0 to below 1, over which the rate rises.
        total_steps: Number of optimizer steps of the run. In the configuration of a module of this package it is left
            out: the module fills in the trainer's number.
    """

    def _decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class PolynomialWithWarmup(LinearWithWarmup):
    """Rise linearly over the first steps, then fall to zero as a power of what is left; momentum may rise meanwhile.

    A power below 1 keeps the rate high for longer and drops it more steeply in the end. That, and a momentum that
    begins low and ends high, paid in runs of 50 steps with large batches and did nothing with small ones
    (`examples/ablation/`).

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup: Share of the run, from 0 to below 1, over which the rate rises.
        power: Of the share of the decay that is left, above 0; 1 is `LinearWithWarmup`.
        momentum: Where the momentum of the optimizer's groups begins, and where it would be one step after the run's
            last; linear over the steps between. None leaves it alone.
        total_steps: Number of optimizer steps of the run. In the configuration of a module of this package it is left
            out: the module fills in the trainer's number.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.1,
        power: float = 0.75,
        momentum: tuple[float, float] | None = None,
        total_steps: int | None = None,
    ) -> None:
        if not 0 < power < math.inf:
            raise UserError(f"power = {power}: the rate falls by a power above 0")
        if momentum is not None:
            if not (
                isinstance(momentum, Sequence) and len(momentum) == 2 and all(0 <= value < 1 for value in momentum)
            ):
                raise UserError(f"momentum = {momentum}: give the first and the last, from 0 to below 1")
            if not all("momentum" in group for group in optimizer.param_groups):
                raise UserError(f"momentum = {momentum}: {type(optimizer).__name__} has none that could rise")
        self.power = power
        self.momentum = momentum
        super().__init__(optimizer, warmup, total_steps)

    def set_total_steps(self, total_steps: int) -> None:
        """Fill in the length of the run, before its first step."""
        super().set_total_steps(total_steps)
        self._set_momentum()

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate and the momentum of the next step."""
        super().step(epoch)
        self._set_momentum()

    def _set_momentum(self) -> None:
        if self.momentum is not None and self.total_steps is not None:
            first, last = self.momentum
            progress = min(1.0, self.last_epoch / self.total_steps)
            for group in self.optimizer.param_groups:
                group["momentum"] = first + (last - first) * progress

    def _decay(self, progress: float) -> float:
        return (1 - progress) ** self.power
