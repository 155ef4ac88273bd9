"""Images that tests write: a gradient whose every pixel differs, so that crops and flips are seen."""

import numpy as np
from PIL import Image


def gradient(width, height):
    """Red grows to the right, green downwards."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], -1).round().astype(np.uint8))


def save(path, width=96, height=64, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient(width, height).save(path, **options)
    return path


def captioned(folder, sizes):
    """Images of these sizes (width, height), numbered, with captions beside them."""
    for number, (width, height) in enumerate(sizes):
        save(folder / f"{number}.png", width, height)
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return str(folder)
