"""The end of all processes of a run when one of them fails."""

import signal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


class EndTogether(Callback):
    """Ends the processes that the first one started on this machine when it fails (on a full disk, say).

    They would wait for it, until the timeout of their communication half an hour later. The other way round, Lightning
    watches over the processes that it starts, as torchrun and SLURM do over theirs.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the others."""
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
