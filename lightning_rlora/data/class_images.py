"""The images of a class that keep a model from forgetting it while it learns one of its members (prior preservation).

The model draws them itself, before training: DreamBooth (arXiv 2208.12242), section 3.3.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import count, islice
from pathlib import Path

from PIL import Image

from lightning_rlora.errors import UserError
from lightning_rlora.files import write_atomically
from lightning_rlora.image_files import is_image

Sample = Callable[[list[str], list[int]], Sequence[Image.Image]]
"""Draws one image for each prompt, with the seed of the same place."""


def missing_class_images(folder: Path, wanted: int) -> list[tuple[int, Path]]:
    """Tells what a folder lacks of so many images: the seed of each missing one, and the file that it belongs into.

    Images of any name count. A folder that is not there lacks all.

    Raises:
        UserError: It is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"class_images: {str(folder)!r} is a file: name a folder, which is made if it is not there")
    there = {file for file in folder.iterdir() if is_image(file)} if folder.is_dir() else set()
    files = ((number, folder / f"class_{number:05d}.png") for number in count())
    free = ((number, file) for number, file in files if file not in there)
    return list(islice(free, max(0, wanted - len(there))))


def draw_class_images(missing: Sequence[tuple[int, Path]], prompt: str, sample: Sample, batch_size: int) -> None:
    """Draws missing images, ``batch_size`` at a time, and writes each as a whole: a broken-off run goes on later.

    Args:
        missing: Seed and file of each image.
        prompt: What the images show.
        sample: Draws images for prompts and seeds.
        batch_size: Images that are drawn together.
    """
    for start in range(0, len(missing), batch_size):
        seeds, files = zip(*missing[start : start + batch_size], strict=True)
        for file, image in zip(files, sample([prompt] * len(files), list(seeds)), strict=True):
            content = BytesIO()
            image.save(content, "PNG")
            write_atomically(file, content.getvalue())
