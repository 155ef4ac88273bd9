import numpy as np
import pytest

from lightning_rlora.data.buckets import bucket_batches, bucket_sizes, nearest_bucket


def test_the_sizes_of_stable_diffusion_xl():
    """Those of the SDXL paper's appendix whose sides lie between 512 and 2048."""
    expected = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408)}
    expected |= {(704, 1472), (640, 1536), (640, 1600), (576, 1664), (576, 1728), (576, 1792), (512, 1920), (512, 2048)}
    sizes = set(bucket_sizes(1024, 64))
    assert sizes >= expected | {size[::-1] for size in expected}


@pytest.mark.parametrize(("size", "multiple"), [(512, 64), (512, 8), (768, 64), (64, 8), (64, 16)])
def test_sizes(size, multiple):
    sizes = bucket_sizes(size, multiple)
    assert (size, size) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert size / 2 <= min(height, width) and max(height, width) <= 2 * size
        assert height * width <= size**2 < (min(height, width) + multiple) * (max(height, width) + multiple)
        assert (width, height) in sizes


def test_one_bucket():
    assert bucket_sizes(512, 512) == [(512, 512)]
    assert bucket_sizes(64, 64) == [(64, 64)]


def test_nearest_is_nearest_by_ratio():
    buckets = [(512, 512), (384, 640), (640, 384), (256, 1024)]
    assert nearest_bucket((3000, 3000), buckets) == (512, 512)
    assert nearest_bucket((3000, 3800), buckets) == (512, 512)  # log(3.8 / 3) = 0.236 is less than half of log(5 / 3)
    assert nearest_bucket((3000, 4000), buckets) == (384, 640)  # log(4 / 3) = 0.288 is more
    assert nearest_bucket((10, 20_000), buckets) == (256, 1024)
    assert nearest_bucket((64, 64), [(448, 448), (512, 512), (320, 320)]) == (512, 512)


def test_batches_hold_every_image_once_and_one_bucket_each():
    generator = np.random.default_rng(0)
    buckets = [[(64, 64), (48, 80), (80, 48)][i] for i in generator.integers(3, size=50)]
    fixed = bucket_batches(buckets, 4)
    drawn = bucket_batches(buckets, 4, np.random.default_rng([1, 2]))
    for batches in (fixed, drawn):
        assert sorted(image for batch in batches for image in batch) == list(range(50))
        assert all(len({buckets[image] for image in batch}) == 1 and len(batch) <= 4 for batch in batches)
        assert sum(len(batch) < 4 for batch in batches) <= 3
    assert len(fixed) == len(drawn) and fixed != drawn
    assert drawn == bucket_batches(buckets, 4, np.random.default_rng([1, 2]))
    assert drawn != bucket_batches(buckets, 4, np.random.default_rng([1, 3]))
    assert all(batch == sorted(batch) for batch in fixed)
