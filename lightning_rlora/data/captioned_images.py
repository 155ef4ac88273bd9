"""CaptionedImageData: images with captions, in batches of like aspect ratio."""

from collections.abc import Sequence
from typing import Any

from lightning_rlora.data.buckets import bucket_batches, bucket_sizes
from lightning_rlora.data.image_data import ImageData, fitted
from lightning_rlora.data.image_sources import Captioned, is_remote, read_captioned
from lightning_rlora.data.pictures import Picture, Pictures, View
from lightning_rlora.data.sources import hold_out, load_hub
from lightning_rlora.errors import UserError
from lightning_rlora.image_files import decode

CHECKED = 5_000
"""Images that are decoded before training, about a minute's worth; a broken one beyond shows when its turn comes."""


class CaptionedImageData(ImageData):
    """Images with captions, for a text-to-image model.

    A source is a folder of images (and subfolders), whose captions stand in "x.txt" beside "x.jpg" or in a file
    "metadata.jsonl" or "metadata.csv" with the fields "file_name" and "text", as Hugging Face's imagefolder has them; a
    Parquet file with the bytes of the images (or a folder or glob of such files); or a data set of the hub
    ("user/name", or "user/name#split"). A caption may also be a list of several, of which every showing takes one.

    Images are turned as their EXIF orientation says, put on white where they are transparent, and scaled and cropped
    into the bucket of the nearest aspect ratio: all buckets have about ``size``^2 pixels, and a batch comes from one.

    The batches of every epoch depend on nothing but the data, the seed and the epoch's number. A run resumed from a
    checkpoint goes on with the very next batch. Nothing is drawn from the global random number generators.

    Batches hold `pixel_values`, float32 of shape (batch, 3, height, width) in [-1, 1]; `prompt`, a list of strings;
    `weight`, float32 of shape (batch,); `key`, a list of strings that name the exact pixels (image, crop, flip); and
    `original_size` (height, width) and `crop_top_left` (top, left), int64 of shape (batch, 2).

    Args:
        train: Source or list of sources to train on.
        validation: Source or list of sources to validate on. Without one, a part of the training images is held out.
        hub_config: Configuration name of hub data sets.
        image_column: Column of the images in Parquet files and hub data sets.
        caption_column: Column of the captions, in metadata files too.
        size: Side of the square bucket in pixels; the other buckets have about its area.
        multiple: What the sides of buckets are multiples of, in pixels; 8 is the least that usual models take. With
            ``multiple`` equal to ``size`` every image is cropped to the square.
        random_crop: Whether each showing crops an image at another place, instead of in the middle. Latents can then
            hardly be cached.
        flip: Whether every other showing, by chance, exchanges left and right.
        batch_size: Images per batch and process; what is left of a bucket makes a smaller batch.
        validation_fraction: Part of the training images that is held out when there is no validation source.
        num_workers: Processes that make batches (0: the training process itself).
        seed: Seeds the held-out part, order, crops, flips and the choice of captions.

    Raises:
        UserError: An argument is wrong, or a source cannot be read.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        hub_config: str | None = None,
        image_column: str = "image",
        caption_column: str = "text",
        size: int = 512,
        multiple: int = 64,
        random_crop: bool = False,
        flip: bool = False,
        batch_size: int = 4,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            size=size,
            multiple=multiple,
            random_crop=random_crop,
            flip=flip,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if not 0 <= validation_fraction < 1:
            raise UserError(f"validation_fraction is {validation_fraction}: it must be in [0, 1)")
        self.sources = {"train": _as_list(train), "validation": _as_list(validation)}
        self.hub_config = hub_config
        self.image_column = image_column
        self.caption_column = caption_column
        self.validation_fraction = validation_fraction
        self.buckets = bucket_sizes(size, multiple)
        self._images: dict[str, list[Captioned]] = {}

    def prepare_data(self) -> None:
        """Downloads hub data sets, on one process only; `datasets` keeps them in its cache."""
        for stage, sources in self.sources.items():
            for source in filter(is_remote, sources):
                load_hub(source, stage, self.hub_config, streaming=False)

    def setup(self, stage: str) -> None:
        """Decodes the images once, the first 5,000 of them, so that a broken one is found before training.

        Takes `val_dataloader` away from a fit that has nothing to validate on, so that Lightning skips it.
        """
        validates = bool(self.sources["validation"] or self.validation_fraction)
        if stage == "fit" and not validates:
            self.val_dataloader = None  # type: ignore[assignment]
        stages = (["train"] if stage == "fit" else []) + (["validation"] if validates else [])
        images = [image for name in stages for image in self._captioned(name)]
        for image in images[:CHECKED]:
            decode(image.name, image.open)

    def val_dataloader(self) -> Any:
        """Every image to validate on once, in the order of the source, cropped in the middle."""
        if not (self.sources["validation"] or self.validation_fraction):
            raise UserError("nothing to validate on: give `validation` or `validation_fraction`")
        return super().val_dataloader()

    def _read(self, stage: str) -> Sequence[Picture]:
        return fitted(self._captioned(stage), self.buckets)

    def _captioned(self, stage: str) -> list[Captioned]:
        if stage not in self._images:
            self._images[stage] = [
                image
                for source in self.sources[stage] or self.sources["train"]
                for image in read_captioned(source, stage, self.hub_config, self.image_column, self.caption_column)
            ]
            if not self._images[stage]:
                raise UserError(f"{stage}: the data set is empty")
            if not self.sources["validation"] and self.validation_fraction:
                kept, held_out = hold_out(self._images[stage], self.validation_fraction, self._random(0, 1))
                self._images = {"train": kept, "validation": held_out}
        return self._images[stage]

    def _epoch(self, pictures: Pictures, epoch: int) -> list[list[View]]:
        generator = self._random(epoch, 0)
        batches = bucket_batches([picture.target for picture in pictures.pictures], self.batch_size, generator)
        return [self._views(pictures, batch, generator) for batch in batches]


def _as_list(sources: str | list[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or [])
