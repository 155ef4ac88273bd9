"""Opening images with care: upright, in RGB, and with one line for whatever is wrong with them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_rlora.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST_SIDE = 8  # pixels; less than one latent of a usual autoencoder
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 swap height and width

Opener = Callable[[], Image.Image]
"""Opens an image; its pixels need not be decoded."""


def image_files(folder: str, subfolders: bool = False) -> list[Path]:
    """Lists the images of a folder by name; hidden ones are passed over.

    Raises:
        UserError: There is no such folder, no image in it, or a link that leads nowhere.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"there is no folder {folder!r}")
    files = [file for file in sorted(path.rglob("*") if subfolders else path.iterdir()) if is_image(file)]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to {file.readlink()}, which is not there: mend or remove it")
    if not files:
        raise UserError(f"the folder {folder!r} holds no image that ends in {', '.join(IMAGE_ENDINGS)}")
    return files


def opened(folder: str) -> list[tuple[str, Opener]]:
    """The images of a folder, each by its path and with what opens it.

    Raises:
        UserError: As `image_files`.
    """
    return [(str(file), partial(Image.open, file)) for file in image_files(folder)]


def is_image(file: Path) -> bool:
    """Tells by its ending whether a file is an image; a link that leads nowhere may be one."""
    return file.suffix.lower() in IMAGE_ENDINGS and (file.is_file() or not file.exists())


def upright_size(name: str, opener: Opener) -> tuple[int, int]:
    """Reads the height and width that an image has once it is turned upright, without decoding it.

    Args:
        name: What the image is called in messages.
        opener: Opens it.

    Raises:
        UserError: It cannot be read, is larger than Pillow takes for safe, or is too small to learn from.
    """
    with _one_line(name), opener() as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= 5:
            height, width = width, height
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"the image {name} has {width} x {height} pixels, too few to learn from (at least {SMALLEST_SIDE} a side):"
            " take it out of the data"
        )
    return height, width


def decode(name: str, opener: Opener) -> Image.Image:
    """Decodes an image as it is meant to be seen: turned as its EXIF orientation says, transparency on white, in RGB.

    Raises:
        UserError: It cannot be read.
    """
    with _one_line(name), opener() as image:
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" and not image.has_transparency_data else _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255
        grey = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises into one line that names the image; its guard against huge images stays on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(
            f"the image {name} has more pixels than the {most:.0f} million that Pillow takes for safe: scale it down"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"the image {name} is broken or in no format that Pillow knows: replace it or take it out of the data"
        ) from error
    except Exception as error:  # every format has errors of its own; nothing but opening and decoding runs here
        raise UserError(f"the image {name} cannot be read ({error}): replace it or take it out of the data") from error
