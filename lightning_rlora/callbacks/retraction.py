"""Keeping adapters on the manifold after every optimizer step, whatever the optimizer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_rlora.adapters import LoraPair, find_pairs, group_by_shape
from lightning_rlora.optim import FixedRankOptimizer, WhitenedRiemannion
from lightning_rlora.optim.balance import balance, imbalance


class Retraction(Callback):
    """Leaves every adapter in the balanced gauge after each real optimizer step.

    In that gauge a point X = U diag(s) V^T is stored as B = U sqrt(s / c) and A = sqrt(s / c) V^T. What the callback
    does for it depends on the optimizer, and it says which at the start of training:

    - `Riemannion` and `RiemannianSGD` retract to the balanced point in their own step. Here the callback only *checks*
      the invariants, every `check_every` steps, and heals factors that drifted further than `tolerance` (changed from
      outside, say); the optimizer carries its momentum to the new bases by itself.
    - `WhitenedRiemannion` retracts, too, to factors that are balanced in its own metric. Its pairs are left alone.
    - Any other optimizer (AdamW, SGD, ...) moves A and B as free parameters. Here the callback *does* the retraction:
      after every step it re-factors each product c B A, which does not change, into its balanced form, and moves the
      first moments (`exp_avg`, `momentum_buffer`) along by the rule of gradients. Second moments cannot be moved and
      stay. A pair whose product is not of full rank (PEFT's B = 0 before the first step) is left alone until it is.

    Steps are real ones: none for the micro-batches of an accumulation, none for a step that a gradient scaler skips.

    Args:
        check_every: Steps between two checks of our optimizers' invariants.
        tolerance: Relative deviation from the balanced gauge that is healed; rounding stays below 1e-5.

    Attributes:
        steps: Optimizer steps seen.
        healed: Pairs of our optimizers that had to be healed.
    """

    def __init__(self, check_every: int = 50, tolerance: float = 1e-4) -> None:
        self.check_every = check_every
        self.tolerance = tolerance
        self.steps = 0
        self.healed = 0
        self._pairs: list[LoraPair] = []
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook every optimizer that holds adapter factors."""
        self._pairs = find_pairs(pl_module)
        for optimizer in trainer.optimizers:
            ours = isinstance(optimizer, FixedRankOptimizer)
            self._handles.append(optimizer.register_step_post_hook(self._check if ours else self._retract))
            if isinstance(optimizer, WhitenedRiemannion):
                what = "retracts by itself, to factors balanced in its own metric"
            elif ours:
                what = "retracts by itself, its invariants are checked"
            else:
                what = "moves free factors, they are balanced after every step"
            rank_zero_info(f"Retraction: {type(optimizer).__name__} {what}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unhook."""
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook."""
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"steps": self.steps, "healed": self.healed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counters of the run that is resumed."""
        self.steps = state_dict["steps"]
        self.healed = state_dict["healed"]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _held_by(self, optimizer: Optimizer) -> list[LoraPair]:
        groups = [group for group in optimizer.param_groups if group.get("algorithm") != "whitened"]
        held = {id(p) for group in groups for p in group["params"]}
        return [pair for pair in self._pairs if id(pair.a) in held and id(pair.b) in held]

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps % self.check_every:
            return
        for batch in group_by_shape(self._held_by(optimizer)):
            drifted = (imbalance(batch) > self.tolerance).tolist()
            if any(drifted):
                balance([pair for pair, off in zip(batch, drifted, strict=True) if off], {})
                self.healed += sum(drifted)

    def _retract(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        balance(self._held_by(optimizer), optimizer.state)
