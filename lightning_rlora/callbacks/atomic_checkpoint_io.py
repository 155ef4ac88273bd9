"""Checkpoint files that are whole or absent, whenever the run is killed."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_rlora.adapters import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its goal, flushes it to the disk and renames it; reads tensors and plain data only.

    Lightning's own writer moves the file from the system's temporary folder, which copies it where that is another
    disk: a run killed meanwhile, or a full disk, would leave half a checkpoint under the good one's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write a checkpoint; what stood under the name before stays until the new file is complete."""
        goal = Path(path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        partial = goal.with_name(f".{goal.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(goal)
        except (OSError, RuntimeError) as error:
            # torch's zip writer hides a full disk behind a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            cause.filename = cause.filename or str(goal)
            raise cause from None
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            UserError: If the file does not exist, is truncated, or holds more than tensors and plain data.
        """
        return read_checkpoint(path, map_location)
