"""The trained adapter in PEFT's format, in the run's folder."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_rlora.adapters import export_adapter, find_adapted, unwrapped


class AdapterExport(Callback):
    """Saves the adapter when training ends, for the pristine base (see `export_adapter`).

    Args:
        folder: Where to; by default `adapter` in the trainer's default_root_dir.
        truncated: Cut an adapter that carries an offset from rank 2r to rank r.
    """

    def __init__(self, folder: str | None = None, truncated: bool = False) -> None:
        self.folder = folder
        self.truncated = truncated

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on the first rank, unless this is only a trial run."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "adapter")
        with unwrapped(pl_module):
            error = export_adapter(find_adapted(pl_module), folder, truncated=self.truncated)
        rank_zero_info(f"Adapter saved to {folder}" + (f", relative truncation error {error:.2e}" if error else ""))
