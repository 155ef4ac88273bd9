"""Where in the data a training stands, read from the trainer's own progress counters.

Lightning saves and restores these counters anyway, so there is no second count that could disagree with them. They
count an epoch or a batch as `ready`, `started`, `processed` and `completed`, in this order; a batch is processed once
its optimizer step is taken, so `processed` is right both for a checkpoint of ``on_train_batch_end`` and for one that
an exception in the middle of the next step leaves behind.
"""

from typing import Any

from lightning.pytorch import Trainer


def place_of(trainer: Trainer) -> tuple[int, int]:
    """Tells where the data go on when Lightning asks its loader for an iterator.

    Returns:
        The epoch, and how many of its batches are done: 0 unless a restored epoch is under way.
    """
    loop: Any = trainer.fit_loop
    epoch = loop.epoch_progress.current
    under_way = loop.is_resuming and epoch.processed < epoch.started
    return epoch.processed, loop.epoch_loop.batch_progress.current.processed if under_way else 0


def settle(trainer: Trainer) -> None:
    """Puts restored counters right where Lightning 2.6 would go on at a wrong place; to be called before it goes on.

    - A checkpoint of an epoch's last batch: that epoch is over. Lightning sees this only if the loader has a length.
    - A checkpoint of an epoch's end: the next epoch begins. With ``max_steps`` Lightning takes it for a restart in the
      middle of an epoch, trains one batch and takes the next epoch for finished.
    - A run that ``max_steps`` or an early stop ended in the middle of an epoch, and that is to go on: that epoch is not
      over. Lightning has counted it as processed.
    """
    loop: Any = trainer.fit_loop
    if not loop.is_resuming:
        return
    epoch, batch = loop.epoch_progress, loop.epoch_loop.batch_progress
    if batch.is_last_batch and batch.total.completed < batch.total.processed:
        batch.increment_completed()
        loop.epoch_loop._batches_that_stepped += 1  # the loggers' step; saved one late, and put right only in restarts
        epoch.increment_processed()
    if epoch.current.ready == epoch.current.started == epoch.current.processed > 0:
        left_early = not batch.is_last_batch
        if left_early:
            for count in (epoch.current, epoch.total):
                count.processed = count.completed = count.processed - 1
        loop._restarting = left_early  # its setter does not allow False together with max_steps
        loop.epoch_loop.restarting = left_early
