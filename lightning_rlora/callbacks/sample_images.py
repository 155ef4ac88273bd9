"""Pictures of fixed prompts and seeds while a text-to-image model is trained."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rlora.errors import UserError
from lightning_rlora.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


class SampleImages(Callback):
    """Samples the same prompts with the same seeds before the first step, every few steps and at the end.

    Each time a grid, with a row for each prompt and a column for each seed, is written to
    `samples/step=<step>.png` in the trainer's `default_root_dir`, and goes to every logger that takes pictures:
    TensorBoard's and Weights & Biases' among Lightning's. Sampling leaves the random state of the training as it is.

    Args:
        prompts: What to draw.
        every_n_steps: Optimizer steps from one time to the next; None for the start and the end only.
        seeds: One picture of each prompt for each.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Strength of classifier-free guidance.

    Raises:
        UserError: If there is no prompt or seed, or a number is not positive.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int | None = 100,
        seeds: Sequence[int] = (0, 1, 2, 3),
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
    ) -> None:
        if not prompts or not seeds:
            raise UserError("SampleImages needs at least one prompt and one seed")
        if (every_n_steps is not None and every_n_steps < 1) or num_inference_steps < 1:
            raise UserError("every_n_steps and num_inference_steps of SampleImages must be at least 1")
        self.prompts = list(prompts)
        self.every_n_steps = every_n_steps
        self.seeds = list(seeds)
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self._last: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the module can sample the prompts, before anything is trained.

        Raises:
            UserError: If it has no method `sample`, or refuses a prompt.
        """
        if not callable(getattr(pl_module, "sample", None)):
            raise UserError(
                f"SampleImages needs a module with a method sample(prompts, seeds), such as TextToImage, and not "
                f"{type(pl_module).__name__}"
            )
        if check_prompts := getattr(pl_module, "check_prompts", None):
            check_prompts(self.prompts)
        self._last = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sample before the first step; by now an initialisation is done and the folder is this run's."""
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample if it is time."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample what the training arrived at."""
        self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, module: Any) -> None:
        step = trainer.global_step
        if step == self._last or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last = step
        rows = []
        with isolate_rng(), trainer.precision_plugin.forward_context():
            for prompt in self.prompts:
                rows.append(
                    module.sample(
                        [prompt] * len(self.seeds),
                        self.seeds,
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                    )
                )
        picture = grid(rows)
        content = io.BytesIO()
        picture.save(content, format="PNG")
        write_atomically(Path(trainer.default_root_dir) / "samples" / f"step={step:06d}.png", content.getvalue())
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(key="samples", images=[picture], step=step)
            elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):  # TensorBoard
                add_image("samples", np.asarray(picture), step, dataformats="HWC")


def grid(rows: list[list[Image]]) -> Image:
    """Pictures of one size, row by row in one picture."""
    from PIL import Image

    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * max(len(row) for row in rows), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture, (x * width, y * height))
    return whole
