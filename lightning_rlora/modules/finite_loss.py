"""Stopping at a loss that is not finite, without making the host wait for the device."""

import torch
from torch import Tensor

from lightning_rlora.errors import Diverged


class FiniteLoss:
    """Looks at every training loss before anything is made of the step after it.

    Reading a loss on a GPU at once makes the host wait for the forward pass, with nothing to do queued behind it. So it
    is copied to pinned memory there, and read when the next one is noted or `check` is called, by when it has arrived.
    Elsewhere it is read at once.
    """

    def __init__(self) -> None:
        self._unread: tuple[Tensor, torch.cuda.Event, int] | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Take the loss of a micro-batch in step `step`, a scalar.

        Raises:
            Diverged: If it or the one before is not finite.
        """
        self.check()
        if not loss.is_cuda:
            _refuse(loss, step)
            return
        copy = torch.empty_like(loss, device="cpu", pin_memory=True)
        copy.copy_(loss.detach(), non_blocking=True)
        self._unread = copy, torch.cuda.current_stream(loss.device).record_event(), step

    def check(self) -> None:
        """Read the loss noted last.

        Raises:
            Diverged: If it is not finite.
        """
        if self._unread is not None:
            copy, arrived, step = self._unread
            arrived.synchronize()
            _refuse(copy, step)
            self._unread = None


def _refuse(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise Diverged(
            f"the training loss is {loss.item()} at step {step}: lower the learning rate or look for bad input data; "
            "checkpoints written before are intact"
        )
