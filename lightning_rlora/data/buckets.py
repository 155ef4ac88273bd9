"""Aspect-ratio buckets: few sizes of about equal area, so that batches are of one size and images lose little."""

import math
from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(size: int, multiple: int) -> list[Size]:
    """Lists the sizes of buckets: sides are multiples of ``multiple`` between half of and twice ``size``.

    For each side the other one is the longest with an area of at most ``size``^2 pixels. With 1024 and 64 these are the
    sizes that Stable Diffusion XL was trained with, as far as their sides lie in that range.

    Args:
        size: Side of the square bucket in pixels, a multiple of ``multiple``.
        multiple: What all sides are multiples of. With ``multiple = size`` there is the square only.

    Returns:
        The sizes, each with its transposed one, from the flattest to the tallest.
    """
    sizes: set[Size] = set()
    for side in range(multiple, 2 * size + 1, multiple):
        other = size * size // side // multiple * multiple
        if 2 * min(side, other) >= size:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda found: (found[0] / found[1], found))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Finds the bucket whose aspect ratio is nearest on a log scale; of equally near ones the larger."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(ratio - math.log(bucket[0] / bucket[1])), -bucket[0] * bucket[1]))


def bucket_batches(
    buckets: Sequence[Size], batch_size: int, generator: np.random.Generator | None = None
) -> list[list[int]]:
    """Cuts images into batches of one bucket each; the last batch of a bucket may be short.

    Args:
        buckets: The bucket of every image.
        batch_size: Most images of a batch.
        generator: Draws the company and the order of the batches; without one the images keep their order in each
            bucket, and buckets follow each other as they first come.

    Returns:
        The numbers of the images of each batch. How many batches there are does not depend on the generator.
    """
    members: dict[Size, list[int]] = {}
    for image, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(image)
    batches: list[list[int]] = []
    for images in members.values():
        order = generator.permutation(images).tolist() if generator else images
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))] if generator else batches
