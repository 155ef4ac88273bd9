"""DreamBoothData: a few photos of a subject, and images of its class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from lightning_rlora.data.class_images import draw_class_images, missing_class_images
from lightning_rlora.data.image_data import ImageData, fitted
from lightning_rlora.data.image_sources import Captioned
from lightning_rlora.data.pictures import Picture, Pictures, View
from lightning_rlora.data.robot import robot_photo, robot_photos
from lightning_rlora.errors import UserError
from lightning_rlora.image_files import Opener, decode, opened

EMBEDDED = {"embedded:robot": (robot_photos, robot_photo)}
"""For each embedded subject, what tells the numbers of a stage's photos, and what draws the photo of a number."""


class DreamBoothData(ImageData):
    """A few photos of one subject, called by a rare token, for a text-to-image model (DreamBooth, arXiv 2208.12242).

    Photos are turned as their EXIF orientation says, put on white where they are transparent, and scaled and cropped to
    a square. An epoch shows each of them `repeats` times, each time with a prompt of `prompts`; the first photos come
    once more if the last batch would not be full.

    With `class_images` every photo is followed by an image of its class (prior preservation), so batches are twice as
    large. Where images are missing, they are drawn before training by the model, if it has a method
    ``sample(prompts, seeds)`` that returns PIL images.

    The batches of every epoch depend on nothing but the data, the seed and the epoch's number. A run resumed from a
    checkpoint goes on with the very next batch. Nothing is drawn from the global random number generators.

    Batches hold `pixel_values`, float32 of shape (batch, 3, size, size) in [-1, 1]; `prompt`, a list of strings;
    `weight`, float32 of shape (batch,), 1 for photos and `prior_weight` for class images; `key`, a list of strings that
    name the exact pixels (image, crop, flip); and `original_size` (height, width) and `crop_top_left` (top, left),
    int64 of shape (batch, 2).

    Args:
        images: Folder of photos, or "embedded:robot", eight photos of a little robot that the package draws.
        class_name: What the subject is, such as "dog".
        token: Rare word that is to mean the subject.
        prompts: What is said of the photos, with {token} and {class_name} to be filled in. By default "a photo of
            {token} {class_name}".
        validation: Folder of photos to validate on. Without one these are the photos that are trained on (the embedded
            subject has four others).
        class_images: Folder of images of the class.
        class_prompt: What is said of them, with {class_name} to be filled in.
        num_class_images: How many class images are wanted; missing ones are drawn by the model. By default those that
            are there.
        prior_weight: Weight of a class image's loss beside a photo's.
        size: Height and width of the images in pixels, a multiple of 8.
        random_crop: Whether each showing crops an image at another place, instead of in the middle. Latents can then
            hardly be cached.
        flip: Whether every other showing, by chance, exchanges left and right; not for subjects with a left and right.
        repeats: How often an epoch shows each photo.
        batch_size: Photos per batch and process.
        num_workers: Processes that make batches (0: the training process itself).
        seed: Seeds order, crops, flips and the choice of prompts.

    Raises:
        UserError: An argument is wrong, or an image is missing or cannot be read.
    """

    def __init__(
        self,
        images: str,
        class_name: str,
        token: str = "sks",
        prompts: list[str] | None = None,
        validation: str | None = None,
        class_images: str | None = None,
        class_prompt: str = "a photo of {class_name}",
        num_class_images: int | None = None,
        prior_weight: float = 1.0,
        size: int = 512,
        random_crop: bool = False,
        flip: bool = False,
        repeats: int = 100,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            size=size,
            multiple=8,
            random_crop=random_crop,
            flip=flip,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        for name, value in {"repeats": repeats, "num_class_images": num_class_images}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if num_class_images and class_images is None:
            raise UserError("num_class_images needs class_images: the folder that they lie in or are drawn into")
        if not prior_weight > 0:
            raise UserError(f"prior_weight is {prior_weight}: it must be above 0 (leave class_images out for none)")
        self.folders = {"train": images, "validation": validation or images}
        self.prompts = [
            _filled(prompt, token=token, class_name=class_name)
            for prompt in (["a photo of {token} {class_name}"] if prompts is None else prompts)
        ]
        if not self.prompts:
            raise UserError("prompts is empty: give one, or leave it out")
        self.class_images = class_images
        self.class_prompt = _filled(class_prompt, class_name=class_name)
        self.num_class_images = num_class_images
        self.prior_weight = prior_weight
        self.repeats = repeats
        self._photos: dict[str, list[Picture]] = {}

    def setup(self, stage: str) -> None:
        """Decodes every photo once and looks at the prompts, so that what is wrong is found before training."""
        self._check_prompts(self.prompts + ([self.class_prompt] if self.class_images is not None else []))
        stages = ("train", "validation") if stage == "fit" else ("validation",)
        for name, opener in {photo.name: photo.open for known in stages for photo in self._subject(known)}.items():
            decode(name, opener)

    def photos(self) -> list[Image.Image]:
        """The photos of the subject that are trained on, upright and whole."""
        return [decode(photo.name, photo.open) for photo in self._subject("train")]

    def _read(self, stage: str) -> Sequence[Picture]:
        photos = self._subject(stage)
        return photos + self._class() if stage == "train" else photos

    def _epoch(self, pictures: Pictures, epoch: int) -> list[list[View]]:
        generator = self._random(epoch, 0)
        photos = len(self._subject("train"))
        batches = -(-photos * self.repeats // self.batch_size)
        count = batches * self.batch_size
        shown = _passes(photos, count, generator).reshape(batches, self.batch_size)
        if self.class_images is not None:
            others = photos + _passes(len(pictures) - photos, count, generator)
            shown = np.concatenate([shown, others.reshape(batches, self.batch_size)], axis=1)
        return [self._views(pictures, batch, generator) for batch in shown.tolist()]

    def _subject(self, stage: str) -> list[Picture]:
        """The photos of the subject."""
        if stage not in self._photos:
            folder = self.folders[stage]
            named = self._embedded(folder, stage) if folder.startswith("embedded:") else opened(folder)
            photos = (Captioned(name, opener, tuple(self.prompts)) for name, opener in named)
            self._photos[stage] = fitted(photos, [(self.size, self.size)])
        return self._photos[stage]

    def _embedded(self, name: str, stage: str) -> list[tuple[str, Opener]]:
        if name not in EMBEDDED:
            raise UserError(f"unknown embedded subject {name!r}: there is {', '.join(EMBEDDED)}")
        numbers, draw = EMBEDDED[name]
        return [(f"{name}/{number}", partial(draw, number, self.size)) for number in numbers(stage)]

    def _class(self) -> list[Picture]:
        """The images of the class; missing ones are drawn first, by one process for all."""
        if self.class_images is None:
            return []
        folder, wanted = Path(self.class_images).expanduser(), self.num_class_images or 0
        missing = missing_class_images(folder, wanted)
        sample: Any = getattr(self._module, "sample", None)
        if missing and sample is None:
            raise UserError(
                f"class_images: the folder {str(folder)!r} holds {wanted - len(missing)} of {wanted} images: add"
                f" {len(missing)}, lower num_class_images, or train a module that can `sample`, as TextToImage"
            )
        if missing and self.trainer and self.trainer.is_global_zero:
            with isolate_rng():
                draw_class_images(missing, self.class_prompt, sample, self.batch_size)
        if self.trainer is not None:
            self.trainer.strategy.barrier("class images")
        named = opened(self.class_images)[: self.num_class_images]
        images = [Captioned(name, opener, (self.class_prompt,)) for name, opener in named]
        return fitted(images, [(self.size, self.size)], self.prior_weight)


def _passes(items: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """So many numbers of items, in passes over all of them, each in an order of its own."""
    return np.concatenate([generator.permutation(items) for _ in range(-(-count // items))])[:count]


def _filled(template: str, **fields: str) -> str:
    try:
        text = template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = " and ".join(f"{{{field}}}" for field in fields)
        raise UserError(f"the prompt {template!r} may only name {known}") from error
    if not text.strip():
        raise UserError("a prompt is empty: give one, or leave it out")
    return text
