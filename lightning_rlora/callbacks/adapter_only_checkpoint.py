"""Checkpoints without the frozen base, for projects of one's own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_rlora.adapters import check_adapter, keep_adapter


class AdapterOnlyCheckpoint(Callback):
    """Makes every checkpoint hold what trains and the offset of the base, but not the frozen base.

    Optimizer, scheduler, loop and callback states are kept as they are. The module must build its base model itself,
    since a resume takes the base from there. The modules of this package do all this without the callback.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a checkpoint without the base be loaded, and refuse one whose adapter does not fit, in one sentence."""
        pl_module.strict_loading = False

        def check(module: LightningModule, state_dict: dict[str, Any], *args: Any) -> None:
            check_adapter(module, state_dict)

        # callbacks' on_load_checkpoint comes after the weights are loaded
        self._handle = pl_module.register_load_state_dict_pre_hook(check)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook."""
        if self._handle is not None:
            self._handle.remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen base from the module's state."""
        checkpoint["state_dict"] = keep_adapter(pl_module, checkpoint["state_dict"])
