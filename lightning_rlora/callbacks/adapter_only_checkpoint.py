"""Checkpoints without the frozen base, for projects of one's own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_rlora.adapters import check_adapter, keep_adapter, scan, track_offsets


class AdapterOnlyCheckpoint(Callback):
    """Makes every checkpoint hold what trains and the offset of the base, but not the frozen base.

    Optimizer, scheduler, loop and callback states are kept as they are. The module must build its base model itself,
    since a resume takes the base from there. The modules of this package do all this without the callback.

    To load such a checkpoint without a Trainer (`load_from_checkpoint`), where no callback runs, call
    `track_offsets(find_pairs(self))` at the end of the module's `__init__`.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._strict: bool | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a checkpoint without the base be loaded, and refuse one whose adapter does not fit, in one sentence."""
        self._strict = pl_module.strict_loading
        pl_module.strict_loading = False
        track_offsets(scan(pl_module).pairs)  # so that the offset of a locally optimal start comes back

        def check(module: LightningModule, state_dict: dict[str, Any], *args: Any) -> None:
            check_adapter(module, state_dict)

        # callbacks' on_load_checkpoint comes after the weights are loaded
        self._handle = pl_module.register_load_state_dict_pre_hook(check)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._undo(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was; Lightning tears nothing down then."""
        self._undo(pl_module)

    def _undo(self, module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            module.strict_loading = bool(self._strict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen base from the module's state."""
        checkpoint["state_dict"] = keep_adapter(pl_module, checkpoint["state_dict"])
