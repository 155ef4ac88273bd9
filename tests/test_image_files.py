"""Every mode becomes the RGB that a viewer shows, and whatever is wrong with an image is one line that names it."""

import struct
import zlib
from functools import partial

import numpy as np
import pytest
from drawn_images import gradient, save
from PIL import Image

from lightning_rlora.errors import UserError
from lightning_rlora.image_files import decode, image_files, upright_size


def read(path):
    opener = partial(Image.open, path)
    size, image = upright_size(str(path), opener), decode(str(path), opener)
    assert image.mode == "RGB" and size == (image.height, image.width)
    return np.asarray(image).astype(int)


def solid(mode, colour, size=(16, 16)):
    return Image.new(mode, size, colour)


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (solid("RGB", (10, 200, 30)), "png", (10, 200, 30)),
        (solid("L", 77), "png", (77, 77, 77)),
        (solid("1", 1), "png", (255, 255, 255)),
        (solid("RGBA", (10, 200, 30, 0)), "png", (255, 255, 255)),  # wholly transparent: the white behind it
        (solid("RGBA", (0, 100, 200, 51)), "png", (204, 224, 244)),  # 0.8 * 255 + 0.2 * colour
        (solid("LA", (0, 51)), "png", (204, 204, 204)),
        (solid("I;16", 257 * 40), "png", (40, 40, 40)),
        (solid("I;16", 65535), "tif", (255, 255, 255)),
        (solid("CMYK", (255, 0, 51, 0)), "tif", (0, 255, 204)),  # (255 - ink) (255 - black) / 255
        (solid("CMYK", (0, 128, 0, 128)), "tif", (127, 63, 127)),
        (solid("P", 0), "png", (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_modes(tmp_path, image, ending, expected):
    image.save(tmp_path / f"a.{ending}")
    pixels = read(tmp_path / f"a.{ending}")
    assert np.abs(pixels - expected).max() <= 1  # measured 0; blending and inks are free to round


def test_cmyk_jpeg(tmp_path):
    solid("CMYK", (255, 0, 51, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read(tmp_path / "a.jpg") - (0, 255, 204)).max() <= 2  # measured 0


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_palettes_with_a_transparent_colour_stand_on_white(tmp_path, ending):
    image = solid("P", 0)
    image.putpalette([200, 0, 0, 0, 90, 0])
    image.paste(1, (0, 0, 8, 16))
    image.save(tmp_path / f"a.{ending}", transparency=0)
    pixels = read(tmp_path / f"a.{ending}")
    assert (pixels[:, :8] == (0, 90, 0)).all() and (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    """Stored pixels are turned by the inverse of what the tag says, so every one of the eight reads the same."""
    upright = np.asarray(gradient(24, 16))
    stored = {  # what a viewer undoes, from the EXIF standard's table of where row 0 and column 0 lie
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert (read(tmp_path / "a.png") == upright).all()


def test_a_very_wide_image_is_read(tmp_path):
    solid("RGB", "red", (20_000, 16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (16, 20_000, 3)


def png_header_of(width, height):
    """A PNG that claims a size and holds nothing."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    if kind == "truncated":
        whole = save(path, 200, 200).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "1 x 1":
        save(path, 1, 1)
    elif kind == "bomb":
        path.write_bytes(png_header_of(20_000, 20_000))
    elif kind == "warned of":
        path.write_bytes(png_header_of(20_000, 5_000))
    elif kind == "float":
        path = tmp_path / "photo.tif"
        solid("F", 0.5).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read .*truncated.*: replace it"),
        ("empty", "broken or in no format that Pillow knows"),
        ("text", "broken or in no format that Pillow knows"),
        ("1 x 1", r"has 1 x 1 pixels, too few to learn from \(at least 8 a side\)"),
        ("bomb", "more pixels than the 89 million that Pillow takes for safe: scale it down"),
        ("warned of", "more pixels than the 89 million that Pillow takes for safe: scale it down"),
        ("float", "floating-point numbers"),
        ("absent", "No such file"),
    ],
)
def test_one_line_for_whatever_is_wrong(tmp_path, kind, message, recwarn):
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value) and not recwarn.list


def test_folders(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        image_files(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no image that ends in \.jpg"):
        image_files(str(tmp_path))
    for name in ("b.PNG", "a.jpg", ".hidden.png", "below/c.png"):
        save(tmp_path / name, format="PNG")
    assert [file.name for file in image_files(str(tmp_path))] == ["a.jpg", "b.PNG"]
    assert [file.name for file in image_files(str(tmp_path), subfolders=True)] == ["a.jpg", "b.PNG", "c.png"]
