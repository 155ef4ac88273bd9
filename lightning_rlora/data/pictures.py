"""From images to training examples: which part of an image is shown, at which size, with which prompt."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from lightning_rlora.data.buckets import Size
from lightning_rlora.errors import UserError
from lightning_rlora.image_files import Opener, decode


@dataclass(frozen=True)
class Picture:
    """An image that is not decoded yet, and how it is trained on.

    Attributes:
        name: What it is called in messages and keys, such as its path.
        open: Opens it.
        prompts: What may be said of it; each showing takes one.
        original: Height and width of the upright image.
        target: Height and width that are trained on; the image is scaled until it just covers them, and cropped.
        weight: Weight of its loss.
    """

    name: str
    open: Opener
    prompts: tuple[str, ...]
    original: Size
    target: Size
    weight: float = 1.0

    @property
    def scaled(self) -> Size:
        """Height and width of the scaled image, before it is cropped."""
        scale = max(new / old for new, old in zip(self.target, self.original, strict=True))
        height, width = (max(new, round(scale * old)) for new, old in zip(self.target, self.original, strict=True))
        return height, width

    @property
    def room(self) -> Size:
        """How far the crop can move downwards and to the right, in pixels of the scaled image."""
        return self.scaled[0] - self.target[0], self.scaled[1] - self.target[1]

    @property
    def is_upscaled(self) -> bool:
        """Whether the image is smaller than what is trained on."""
        return any(new > old for new, old in zip(self.scaled, self.original, strict=True))

    def crop(self, top: int, left: int) -> np.ndarray:
        """Cuts the target size out of the scaled image, uint8 of shape (height, width, 3).

        The scaled image is never made as a whole, so one that is very long costs no more than others.
        """
        image = decode(self.name, self.open)
        down, right = (new / old for new, old in zip(self.scaled, self.original, strict=True))
        box = (left / right, top / down, (left + self.target[1]) / right, (top + self.target[0]) / down)
        inside = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # not beyond it by rounding
        return np.asarray(image.resize(self.target[::-1], Image.Resampling.LANCZOS, box=inside))


class View(NamedTuple):
    """One showing of a picture.

    Attributes:
        picture: Its number.
        top: Where the crop begins in the scaled picture, in pixels from above.
        left: The same from the left.
        flip: Whether left and right are exchanged afterwards.
        prompt: Number of the prompt.
    """

    picture: int
    top: int
    left: int
    flip: bool = False
    prompt: int = 0


class Shown(NamedTuple):
    """What a view looks like: `pixels`, uint8 of shape (height, width, 3), and the rest of a batch's fields."""

    pixels: np.ndarray
    prompt: str
    weight: float
    key: str
    original_size: Size
    crop_top_left: tuple[int, int]


class Pictures(Dataset):
    """The pictures of a split, decoded as they are shown; the latest crops are kept, at most ``KEPT`` of them."""

    KEPT = 64

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pictures = pictures
        self._crops: dict[tuple[int, int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, view: View) -> Shown | UserError:
        """Shows a view. An error is returned, since one that a worker raises would come with the worker's traceback."""
        try:
            return self._show(view)
        except UserError as error:
            return error

    @property
    def checksum(self) -> int:
        """A number that other data would hardly have."""
        parts = ((Path(p.name).name, p.original, p.target, p.prompts, p.weight) for p in self.pictures)
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(repr(part).encode(), checksum)
        return checksum

    def centred(self, number: int) -> View:
        """The view that shows the middle of a picture with its first prompt."""
        down, right = self.pictures[number].room
        return View(number, down // 2, right // 2)

    def drawn(self, number: int, draw: np.ndarray, random_crop: bool, flip: bool) -> View:
        """The view that four numbers in [0, 1) stand for: place downwards and to the right, flip and prompt."""
        view = self.centred(number)
        if random_crop:
            down, right = self.pictures[number].room
            view = view._replace(top=int(draw[0] * (down + 1)), left=int(draw[1] * (right + 1)))
        count = len(self.pictures[number].prompts)
        return view._replace(flip=flip and bool(draw[2] < 0.5), prompt=int(draw[3] * count))

    def _show(self, view: View) -> Shown:
        picture = self.pictures[view.picture]
        pixels = self._crop(view.picture, view.top, view.left)
        height, width = picture.target
        key = f"{picture.name}|{height}x{width}+{view.top}+{view.left}{'|flipped' * view.flip}"
        left = picture.room[1] - view.left if view.flip else view.left  # as if the picture were flipped first
        return Shown(
            pixels[:, ::-1] if view.flip else pixels,
            picture.prompts[view.prompt],
            picture.weight,
            key,
            picture.original,
            (view.top, left),
        )

    def _crop(self, number: int, top: int, left: int) -> np.ndarray:
        place = (number, top, left)
        if place not in self._crops:
            if len(self._crops) == self.KEPT:
                del self._crops[next(iter(self._crops))]
            self._crops[place] = self.pictures[number].crop(top, left)
        return self._crops[place]


def picture_batch(shown: Sequence[Shown | UserError]) -> dict[str, Any] | UserError:
    """Makes a batch of pictures of one size.

    Returns:
        ``pixel_values``, float32 of shape (pictures, 3, height, width) in [-1, 1]; ``prompt``, a list of strings;
        ``weight``, float32 of shape (pictures,); ``key``, a list of strings that tell one view's pixels from another's;
        ``original_size`` (height, width) and ``crop_top_left`` (top, left), int64 of shape (pictures, 2), in pixels of
        the upright image and of the scaled one. Or the first error of showing one.
    """
    columns: list[Shown] = []
    for one in shown:
        if isinstance(one, UserError):
            return one
        columns.append(one)
    pixels = torch.from_numpy(
        np.stack([one.pixels for one in columns]).transpose(0, 3, 1, 2).astype(np.float32, order="C")
    )
    return {
        "pixel_values": pixels / 127.5 - 1,
        "prompt": [one.prompt for one in columns],
        "weight": torch.tensor([one.weight for one in columns], dtype=torch.float32),
        "key": [one.key for one in columns],
        "original_size": torch.tensor([one.original_size for one in columns]),
        "crop_top_left": torch.tensor([one.crop_top_left for one in columns]),
    }
