import numpy as np

from lightning_rlora.data.robot import FACE, METAL, RED, YELLOW, robot_photo, robot_photos


def test_photos_are_repeatable_and_all_different():
    numbers = [*robot_photos("train"), *robot_photos("validation")]
    assert len(robot_photos("train")) == 8 and len(set(numbers)) == 12
    images = [np.asarray(robot_photo(number)) for number in numbers]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in images)
    assert all((image == np.asarray(robot_photo(number))).all() for number, image in zip(numbers, images, strict=True))
    difference = [np.abs(a.astype(int) - b).mean() for i, a in enumerate(images) for b in images[:i]]
    assert min(difference) > 15  # of 255; measured 26.6


def test_the_robot_stands_in_every_photo():
    """Its body, face, hat and hands have their colours somewhere, whatever the place behind it."""
    for number in range(24):
        pixels = np.asarray(robot_photo(number)).astype(int).reshape(-1, 3)
        for colour, least in ((METAL, 80), (FACE, 60), (RED, 20), (YELLOW, 15)):  # measured 111, 82, 30, 23
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).max(1) < 40).sum() > least, (number, colour)


def test_a_larger_photo_is_the_same_one():
    small = np.asarray(robot_photo(1, 64)).astype(int)
    large = np.asarray(robot_photo(1, 256).resize((64, 64))).astype(int)
    assert np.abs(small - large).mean() < 6  # of 255; measured 2.8: lines have whole widths
