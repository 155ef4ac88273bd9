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
from lightning_rlora.files import write_plot

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TRAINED_ON = "trained_on.png"
"""The file of the first training batch's pictures."""


class SampleImages(Callback):
    """Samples the same prompts with the same seeds before the first step, every few steps and at the end.

    Each time a grid, with a row for each prompt and a column for each seed, is written to
    `samples/step=<step>.png` in the trainer's `default_root_dir`, and goes to every logger that takes pictures:
    TensorBoard's and Weights & Biases' among Lightning's. Sampling leaves the random state of the training as it is.

    Pictures of the first training batch, as many as a grid shows, are kept in `samples/trained_on.png`, if the batch
    has `pixel_values`. At the end the first grid, the last one and these stand side by side in
    `samples/before_after.png`.

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
        if trainer.global_step == 0 and self._due(trainer):
            self._sample(trainer, pl_module)
            if isinstance(batch, dict) and "pixel_values" in batch:
                self._keep(batch["pixel_values"], _folder(trainer) / TRAINED_ON)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample if it is time."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample what the training arrived at, and put it beside what it began with."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._sample(trainer, pl_module)
        folder = _folder(trainer)
        parts = {
            "before": folder / _name(0),
            f"after {trainer.global_step} steps": folder / _name(trainer.global_step),
            "trained on": folder / TRAINED_ON,
        }
        if trainer.is_global_zero and trainer.global_step and all(path.is_file() for path in parts.values()):
            _save(side_by_side(parts), folder / "before_after.png")

    def _keep(self, pixels: Tensor, path: Path) -> None:
        """Write pictures (B, 3, H, W) in the shape of the grids, as many as these have room for."""
        wide = len(self.seeds)
        pictures = [_picture(one) for one in pixels[: wide * len(self.prompts)]]
        _save(grid([pictures[i : i + wide] for i in range(0, len(pictures), wide)]), path)

    def _due(self, trainer: Trainer) -> bool:
        trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        return trainer.global_step != self._last and trainer.is_global_zero and not trial

    def _sample(self, trainer: Trainer, module: Any) -> None:
        if not self._due(trainer):
            return
        self._last = step = trainer.global_step
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
        _save(picture, _folder(trainer) / _name(step))
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


def side_by_side(parts: dict[str, Path]) -> Image:
    """The pictures of files beside each other, each below its caption."""
    from PIL import Image, ImageDraw, ImageFont

    caption, gap = 16, 8  # pixels
    pictures = [Image.open(path) for path in parts.values()]
    font = ImageFont.load_default()
    widths = [max(picture.width, int(font.getlength(text)) + 4) for text, picture in zip(parts, pictures, strict=True)]
    size = sum(widths) + gap * (len(pictures) - 1), caption + max(picture.height for picture in pictures)
    whole = Image.new("RGB", size, "white")
    left = 0
    for text, picture, width in zip(parts, pictures, widths, strict=True):
        ImageDraw.Draw(whole).text((left + 2, 2), text, fill="black", font=font)
        whole.paste(picture, (left, caption))
        left += width + gap
    return whole


def _picture(pixels: Tensor) -> Image:
    """The picture of pixels (3, H, W) in [-1, 1]."""
    from PIL import Image

    values = (pixels.float().cpu().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy())


def _save(picture: Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_plot(path, content.getvalue())


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "samples"


def _name(step: int) -> str:
    return f"step={step:06d}.png"
