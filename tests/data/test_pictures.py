"""Crops against the scaled image cut by hand, and batches as the module expects them."""

from functools import partial

import numpy as np
import pytest
import torch
from drawn_images import gradient, save
from PIL import Image

from lightning_rlora.data.pictures import Picture, Pictures, View, picture_batch
from lightning_rlora.image_files import upright_size


@pytest.fixture
def picture(tmp_path):
    def make(width, height, target, prompts=("a", "b"), weight=1.0):
        path = save(tmp_path / f"{width}x{height}.png", width, height)
        opener = partial(Image.open, path)
        return Picture(str(path), opener, prompts, upright_size(str(path), opener), target, weight)

    return make


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (100, 100), (33, 200), (20, 24), (32, 32), (3001, 9)])
def test_a_crop_is_cut_out_of_the_scaled_image(picture, size):
    width, height = size
    shown = picture(width, height, (32, 48))
    scale = max(32 / height, 48 / width)
    scaled = gradient(width, height).resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
    assert shown.scaled == (scaled.height, scaled.width)
    room = (scaled.height - 32, scaled.width - 48)
    assert shown.room == room and min(room) == 0
    for share in (0, 0.5, 1):
        top, left = (int(share * r) for r in room)
        expected = np.asarray(scaled).astype(int)[top : top + 32, left : left + 48]
        # the two ways differ in how far the filter looks beyond the crop: measured 1 of 255
        assert np.abs(shown.crop(top, left) - expected).max() <= 1


def test_upscaling_is_known(picture):
    assert picture(40, 40, (48, 48)).is_upscaled
    assert picture(40, 400, (48, 48)).is_upscaled
    assert not picture(48, 48, (48, 48)).is_upscaled and not picture(49, 60, (48, 48)).is_upscaled


def test_batch(picture):
    pictures = Pictures([picture(96, 64, (32, 32)), picture(40, 64, (32, 32), ("class",), 0.25)])
    views = [View(0, 0, 3, flip=True, prompt=1), View(0, 0, 3), View(1, 5, 0)]
    batch = picture_batch([pictures[view] for view in views])
    assert set(batch) == {"pixel_values", "prompt", "weight", "key", "original_size", "crop_top_left"}
    pixels = batch["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels[0], pixels[1].flip(-1))
    expected = torch.from_numpy(pictures.pictures[1].crop(5, 0).copy()).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(pixels[2], expected, atol=1e-6, rtol=0)  # measured 0
    assert batch["prompt"] == ["b", "a", "class"]
    assert batch["weight"].tolist() == [1, 1, 0.25] and batch["weight"].dtype == torch.float32
    assert batch["original_size"].tolist() == [[64, 96], [64, 96], [64, 40]]
    assert batch["original_size"].dtype == batch["crop_top_left"].dtype == torch.int64
    # 96 x 64 is scaled to 48 x 32: of the 16 columns that are cut, a flipped picture has lost 13 on its left
    assert batch["crop_top_left"].tolist() == [[0, 13], [0, 3], [5, 0]]


def test_white_and_black_are_one_and_minus_one(tmp_path):
    for colour, value in (("white", 1), ("black", -1)):
        path = tmp_path / f"{colour}.png"
        Image.new("RGB", (16, 16), colour).save(path)
        pictures = Pictures([Picture(colour, partial(Image.open, path), ("",), (16, 16), (8, 8))])
        assert (picture_batch([pictures[View(0, 0, 0)]])["pixel_values"] == value).all()


def test_a_key_names_the_pixels(picture):
    pictures = Pictures([picture(96, 64, (32, 32)), picture(64, 96, (32, 32)), picture(96, 64, (64, 64))])
    views = [View(0, 0, 3), View(0, 0, 4), View(0, 0, 3, True), View(1, 3, 0), View(2, 0, 3), View(0, 0, 3, prompt=1)]
    keys = [pictures[view].key for view in views]
    assert len(set(keys)) == 5 and keys[0] == keys[-1]


def test_draws_reach_all_crops_flips_and_prompts(picture):
    pictures = Pictures([picture(96, 64, (32, 32), ("a", "b", "c"))])
    draws = np.random.default_rng(0).random((2000, 4))
    views = [pictures.drawn(0, draw, random_crop=True, flip=True) for draw in draws]
    assert {view.left for view in views} == set(range(17)) and {view.top for view in views} == {0}
    assert {view.prompt for view in views} == {0, 1, 2}
    assert 900 < sum(view.flip for view in views) < 1100
    still = [pictures.drawn(0, draw, random_crop=False, flip=False) for draw in draws]
    assert {(view.top, view.left, view.flip) for view in still} == {(0, 8, False)}


def test_few_crops_are_kept(picture):
    pictures = Pictures([picture(200, 32, (32, 32))])
    for _ in range(2):
        for left in range(100):
            pictures[View(0, 0, left)]
    assert len(pictures._crops) == Pictures.KEPT
