"""The record of a run: one table of its losses that survives kills and resumes, and a plot of it."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlora.callbacks.run_folder import holds_run, lies_in, set_aside
from lightning_rlora.files import write_atomically, write_plot

COLUMNS = ("step", "train/loss", "val/loss")
"""The first columns of metrics.csv; other validation metrics follow in the order in which they first appear."""

Row = dict[str, int | float]


class RunRecord(Callback):
    """Keep metrics.csv and loss.png in the run folder, the trainer's `default_root_dir`.

    A row holds the training loss (`train/loss`) of every `log_every_n_steps`-th optimizer step and the validation
    metrics (all that are logged under a name that starts with `val`), by the number of optimizer steps taken. The
    sanity validation is the row of step 0, if it goes over the whole validation set (`num_sanity_val_steps: -1`).

    A run that was killed and resumed leaves the very file that it would have left uninterrupted: the rows travel in the
    checkpoints, so the file is put back to what it was when the checkpoint was made, whatever has become of it since.
    After a checkpoint made between a step and its validation, Lightning 2.6 leaves that validation out on the resume;
    it is made up for here, and other callbacks (early stopping, checkpoints) see it too.

    A new run in a folder that holds an earlier one moves the earlier one into `previous/<n>`. So does a run that
    resumes from a checkpoint elsewhere, or from one without a record. Nothing is written or moved under `fast_dev_run`.

    The callback must stand before the ones that write into the folder, above all before the one that saves config.yaml:
    it reads the old config.yaml in `setup`, and moves the other files right before the first validation or training
    step, since Lightning tells no callback earlier whether the run is a resumed one.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._columns = list(COLUMNS)
        self._step = 0
        self._validation_due = False
        self._begun = False
        self._restored = False
        self._old_config: bytes | None = None
        self._limits: tuple[int, int | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and whether the last step's validation is still to come."""
        return {"rows": [dict(row) for row in self._rows], "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to the rows of a checkpoint."""
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._columns = list(dict.fromkeys([*COLUMNS, *(name for row in self._rows for name in row)]))
        self._validation_due = state_dict["validation_due"]
        self._restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the config.yaml of an earlier run, before the new one's is written."""
        self._begun = self._restored = False
        config = _folder(trainer) / "config.yaml"
        if stage == "fit" and trainer.is_global_zero and config.is_file():
            self._old_config = config.read_bytes()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed run enter its loop for the validation that is still to come, even if no step is left."""
        if self._validation_due:
            loop = trainer.fit_loop
            self._limits = (loop.epoch_loop.max_steps, loop.max_epochs)
            if loop.epoch_loop.max_steps >= 0:
                loop.epoch_loop.max_steps += 1
            if loop.max_epochs is not None and loop.max_epochs >= 0:
                loop.max_epochs += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the record, now that the data could be read."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the record, and make up for the validation that the checkpoint was made before."""
        if self._limits is not None:
            trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = self._limits
            self._limits = None
        self._begin(trainer)
        self._step = trainer.global_step
        if self._validation_due:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch begins: no validation is due until it ends."""
        self._validation_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the training loss, if the batch ended an optimizer step."""
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation window
        self._step = trainer.global_step
        due = self._step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and "train/loss" in trainer.callback_metrics:
            self._record(trainer, {"train/loss": float(trainer.callback_metrics["train/loss"])})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation metrics."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        whole = trainer.num_sanity_val_batches == trainer.num_val_batches
        if trainer.sanity_checking and (trainer.global_step > 0 or not whole):
            return  # some resumed runs begin with a sanity check too
        self._validation_due = False
        metrics = trainer.callback_metrics
        names = [name for name in metrics if name.startswith("val") and not name.endswith("_step")]
        self._record(trainer, {name: float(metrics[name]) for name in names})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the losses."""
        self._begin(trainer)  # a resumed run that had no step left never started
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the losses so far."""
        if self._begun:
            self._draw(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Make the folder this run's, with the record as it stands: empty, or a checkpoint's."""
        if self._begun or _is_trial(trainer):
            return
        self._begun = True
        folder, checkpoint = _folder(trainer), trainer.ckpt_path
        if checkpoint is None:
            goes_on = trainer.global_step > 0  # a second fit of the same trainer
        else:
            goes_on = self._restored and lies_in(checkpoint, folder)
        if checkpoint is None and not goes_on:
            self.load_state_dict({"rows": [], "validation_due": False})
        if not trainer.is_global_zero:
            return
        if not goes_on and holds_run(folder):
            rank_zero_info(f"{folder} held an earlier run: it is now in {set_aside(folder, self._old_config)}")
        self._write(trainer)

    def _record(self, trainer: Trainer, metrics: Row) -> None:
        """Add metrics to the row of the current step, and bring the file up to date."""
        if _is_trial(trainer) or not trainer.is_global_zero or not metrics:
            return
        step = trainer.global_step
        known = len(self._columns)
        self._columns = list(dict.fromkeys([*self._columns, *metrics]))
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1] |= metrics
        else:
            self._rows.append({"step": step, **metrics})
            if len(self._columns) == known:
                with (_folder(trainer) / "metrics.csv").open("a", encoding="utf-8", newline="") as file:
                    self._writer(file).writerow(self._rows[-1])
                return
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write the whole file."""
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(_folder(trainer) / "metrics.csv", text.getvalue().encode())

    def _writer(self, file: Any) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")  # writes floats by repr: exact

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not _is_trial(trainer) and len(self._rows) > 1:
            draw_losses(self._rows, _folder(trainer) / "loss.png")


def draw_losses(rows: list[Row], path: Path) -> None:
    """Plot the training and validation loss over the steps, with their final values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, width, marker in (("train/loss", "training", 1.0, ""), ("val/loss", "validation", 2.0, "o")):
        curve = [(row["step"], row[name]) for row in rows if name in row]
        if curve:
            final = curve[-1][1]
            axes.plot(*zip(*curve, strict=True), label=f"{label} (final {final:.4g})", linewidth=width, marker=marker)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_plot(path, content.getvalue())


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir)


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
