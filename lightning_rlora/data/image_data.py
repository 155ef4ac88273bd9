"""What the data modules of images share: their options, checks, and the order of views."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlora.data.buckets import Size, bucket_batches, nearest_bucket
from lightning_rlora.data.image_loader import ImageLoader
from lightning_rlora.data.image_sources import Captioned
from lightning_rlora.data.pictures import Picture, Pictures, View
from lightning_rlora.data.resumable_data import ResumableData
from lightning_rlora.errors import UserError
from lightning_rlora.image_files import upright_size


class ImageData(ResumableData):
    """Batches of images with prompts, decoded as they are needed.

    Subclasses say which images a stage has (`_read`) and which views of them an epoch shows (`_epoch`).

    Args:
        size: Side in pixels of the square that is trained on.
        multiple: What the sides of all batches are multiples of.
        random_crop: Whether each showing crops an image at another place, instead of in the middle.
        flip: Whether every other showing, by chance, exchanges left and right.
        batch_size: Images per batch and process.
        num_workers: Processes that make batches.
        seed: Seeds order, crops, flips and the choice of prompts.

    Raises:
        UserError: An argument is wrong.
    """

    def __init__(
        self,
        *,
        size: int,
        multiple: int,
        random_crop: bool,
        flip: bool,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if multiple < 1:
            raise UserError(f"multiple is {multiple}: it must be at least 1")
        if size < multiple or size % multiple:
            raise UserError(f"size is {size}: it must be a multiple of {multiple} pixels")
        self.size = size
        self.random_crop = random_crop
        self.flip = flip
        self._read_pictures: dict[str, Pictures] = {}

    @abstractmethod
    def _read(self, stage: str) -> Sequence[Picture]:
        """The pictures of a stage, "train" or "validation"."""

    @abstractmethod
    def _epoch(self, pictures: Pictures, epoch: int) -> list[list[View]]:
        """The views of each batch of an epoch of training, equally many batches in every epoch."""

    def train_dataloader(self) -> ImageLoader:
        """Batches to train on, from the place at which the trainer stands."""
        pictures = self._pictures("train")
        still = bool(getattr(self.trainer, "overfit_batches", 0))
        return ImageLoader(pictures, lambda epoch: self._epoch(pictures, 0 if still else epoch), **self._training())

    def val_dataloader(self) -> Any:
        """Every image to validate on once, in the order of the source, cropped in the middle."""
        pictures = self._pictures("validation")
        batches = bucket_batches([picture.target for picture in pictures.pictures], self.batch_size)
        views = [[pictures.centred(number) for number in batch] for batch in batches]
        return ImageLoader(pictures, lambda epoch: views, num_workers=self.num_workers, **self._processes())

    def test_dataloader(self) -> Any:
        """Refuses: `rlora validate` measures."""
        raise UserError("image data have no part to test on: measure with `rlora validate`")

    def predict_dataloader(self) -> Any:
        """Refuses: pictures are sampled."""
        raise UserError("image data have nothing to predict on: sample pictures with the callback SampleImages")

    def _pictures(self, stage: str) -> Pictures:
        if stage not in self._read_pictures:
            pictures = self._read(stage)
            self._check_prompts(list(dict.fromkeys(prompt for picture in pictures for prompt in picture.prompts)))
            _warn_of_upscaling(stage, pictures)
            self._read_pictures[stage] = Pictures(pictures)
        return self._read_pictures[stage]

    def _check_prompts(self, prompts: list[str]) -> None:
        """Let the module refuse prompts before it is trained."""
        if check := getattr(self._module, "check_prompts", None):
            check(prompts)

    def _views(self, pictures: Pictures, numbers: Sequence[int], generator: np.random.Generator) -> list[View]:
        """One showing of each of the pictures with these numbers, drawn as the options say."""
        draws = generator.random((len(numbers), 4))
        return [
            pictures.drawn(number, draw, self.random_crop, self.flip)
            for number, draw in zip(numbers, draws, strict=True)
        ]


def fitted(images: Iterable[Captioned], buckets: Sequence[Size], weight: float = 1.0) -> list[Picture]:
    """Reads the sizes of images, and fits each into the bucket of the nearest aspect ratio.

    Raises:
        UserError: An image cannot be read or is too small or too large.
    """
    pictures = []
    for name, opener, captions in images:
        size = upright_size(name, opener)
        pictures.append(Picture(name, opener, captions, size, nearest_bucket(size, buckets), weight))
    return pictures


def _warn_of_upscaling(stage: str, pictures: Sequence[Picture]) -> None:
    upscaled = [picture for picture in pictures if picture.is_upscaled]
    if upscaled:
        least = min(upscaled, key=lambda picture: picture.original[0] * picture.original[1])
        rank_zero_warn(
            f"{stage}: {len(upscaled)} of {len(pictures)} images are smaller than what is trained on and will be scaled"
            f" up and blurred, the smallest is {least.name} ({least.original[1]} x {least.original[0]} pixels)"
        )
