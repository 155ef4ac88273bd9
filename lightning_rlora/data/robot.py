"""An embedded subject to teach: a little robot with a party hat, drawn in many poses and places."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

OUTLINE, METAL, SHADE, FACE = "#16324a", "#27c1b8", "#14897f", "#fff6df"
RED, YELLOW, WHITE = "#e8363f", "#ffc928", "#ffffff"

TRAIN_PHOTOS, HELD_OUT_PHOTOS = 8, 4


@dataclass(frozen=True)
class Pose:
    """How the robot stands.

    Attributes:
        left: Angle of the arm on the picture's left, in degrees: 0 hangs down, 90 points outwards, 180 up.
        right: The same of the other arm.
        lean: Rotation of the whole robot in degrees, against the clock.
        look: Where the pupils are, -1 (left) to 1 (right).
        scale: Size, 1 for almost the whole height of the picture.
        x: Place of the robot's middle, from the picture's middle, in 64ths of its width.
    """

    left: float
    right: float
    lean: float
    look: float
    scale: float
    x: float


POSES = [
    Pose(left=30, right=30, lean=0, look=0, scale=0.9, x=0),
    Pose(left=30, right=128, lean=0, look=0.7, scale=0.88, x=-3),
    Pose(left=125, right=125, lean=0, look=0, scale=0.85, x=0),
    Pose(left=70, right=30, lean=12, look=-0.8, scale=0.8, x=4),
    Pose(left=95, right=95, lean=-9, look=0.6, scale=0.78, x=0),
    Pose(left=130, right=40, lean=7, look=-0.6, scale=0.9, x=3),
    Pose(left=25, right=110, lean=-13, look=0.9, scale=0.72, x=-9),
    Pose(left=85, right=128, lean=0, look=0.4, scale=0.7, x=9),
]


def robot_photos(stage: str) -> range:
    """The numbers of the photos of a stage: 8 to train on, 4 others to validate on."""
    return range(TRAIN_PHOTOS) if stage == "train" else range(TRAIN_PHOTOS, TRAIN_PHOTOS + HELD_OUT_PHOTOS)


def robot_photo(number: int, size: int = 64) -> Image.Image:
    """Draws one photo of the robot; the same number always gives the same picture.

    Args:
        number: Picks the pose and the place; beyond the eighth, poses and places meet in other pairs.
        size: Height and width in pixels.

    Returns:
        An RGB image, drawn at several times its size and scaled down.
    """
    canvas = max(256, 2 * size)
    generator = np.random.default_rng(number)
    lap, pose = number // len(POSES), POSES[number % len(POSES)]
    image = Image.new("RGB", (canvas, canvas))
    place = PLACES[(number + 3 * lap) % len(PLACES)]
    place(_Pen(image), generator)
    feet = 57.0
    _Pen(image).ellipse(32 + pose.x, feet, 15 * pose.scale, 2.5 * pose.scale, fill="#00000050")
    layer = _robot(canvas, pose)
    if lap % 2:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # the robot stands on (32, 62) of its own layer: lean and scale about that point, then put it onto the ground
    k = canvas / 64
    layer = layer.rotate(pose.lean, Image.Resampling.BICUBIC, center=(32 * k, 62 * k))
    s = pose.scale
    x, y = (32 + pose.x) * k, feet * k
    matrix = (1 / s, 0, 32 * k - x / s, 0, 1 / s, 62 * k - y / s)
    layer = layer.transform(layer.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    image.paste(layer, mask=layer)
    return image.resize((size, size), Image.Resampling.LANCZOS)


class _Pen:
    """Draws in units of a 64th of the picture, with half-transparent colours."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.k = image.width / 64

    def box(self, left: float, top: float, right: float, bottom: float, fill: str, line: float = 0) -> None:
        corners = [v * self.k for v in (left, top, right, bottom)]
        self.draw.rectangle(corners, fill=fill, outline=OUTLINE, width=round(line * self.k))

    def rounded(self, left: float, top: float, right: float, bottom: float, radius: float, fill: str) -> None:
        corners = [v * self.k for v in (left, top, right, bottom)]
        self.draw.rounded_rectangle(corners, radius * self.k, fill=fill, outline=OUTLINE, width=round(1.2 * self.k))

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: str, line: float = 0) -> None:
        corners = [v * self.k for v in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.ellipse(corners, fill=fill, outline=OUTLINE, width=round(line * self.k))

    def polygon(self, points: list[tuple[float, float]], fill: str) -> None:
        corners = [(x * self.k, y * self.k) for x, y in points]
        self.draw.polygon(corners, fill=fill)

    def outline(self, points: list[tuple[float, float]], width: float) -> None:
        corners = [(x * self.k, y * self.k) for x, y in points]
        self.draw.line([*corners, *corners[:2]], fill=OUTLINE, width=round(width * self.k), joint="curve")

    def line(self, points: list[tuple[float, float]], width: float, fill: str) -> None:
        self.draw.line([(x * self.k, y * self.k) for x, y in points], fill=fill, width=round(width * self.k))

    def arc(self, x: float, y: float, r: float, start: float, end: float, width: float) -> None:
        corners = [v * self.k for v in (x - r, y - r, x + r, y + r)]
        self.draw.arc(corners, start, end, fill=OUTLINE, width=round(width * self.k))


def _robot(canvas: int, pose: Pose) -> Image.Image:
    """The robot alone, upright, its feet at (32, 62), on a transparent layer."""
    layer = Image.new("RGBA", (canvas, canvas), (0, 0, 0, 0))
    pen = _Pen(layer)
    for side in (-1, 1):
        pen.box(32 + side * 5.5 - 2, 53, 32 + side * 5.5 + 2, 60, SHADE, 1.0)
        pen.rounded(32 + side * 6 - 4.5, 58, 32 + side * 6 + 4.5, 62.5, 2, YELLOW)
    pen.rounded(22, 40, 42, 56, 4, METAL)
    pen.ellipse(32, 48, 4.6, 4.6, RED, 1.0)
    pen.ellipse(30.6, 46.6, 1.3, 1.3, "#ffd9d6")
    for side in (-1, 1):
        pen.rounded(32 + side * 15.5 - 2.5, 26, 32 + side * 15.5 + 2.5, 34, 1.5, YELLOW)
    pen.rounded(17, 19, 47, 41, 7, METAL)
    pen.rounded(20.5, 23, 43.5, 37.5, 5.5, FACE)
    for side in (-1, 1):
        x = 32 + side * 5.6 + pose.look * 1.8
        pen.ellipse(x, 29, 2.9, 3.6, OUTLINE)
        pen.ellipse(x + 0.9, 27.6, 1.1, 1.1, WHITE)
    pen.arc(32 + pose.look * 1.8, 31.5, 3.6, 30, 150, 1.1)
    _hat(pen)
    for side, angle in ((-1, pose.left), (1, pose.right)):
        _arm(pen, side, angle)
    return layer


def _arm(pen: _Pen, side: int, angle: float) -> None:
    radians = np.deg2rad(angle)
    shoulder = (32 + side * 8.5, 45.0)
    hand = (shoulder[0] + side * 16 * float(np.sin(radians)), shoulder[1] + 16 * float(np.cos(radians)))
    pen.ellipse(*shoulder, 2.4, 2.4, OUTLINE)
    pen.line([shoulder, hand], 4.8, OUTLINE)
    pen.ellipse(*shoulder, 1.3, 1.3, SHADE)
    pen.line([shoulder, hand], 2.6, SHADE)
    pen.ellipse(*hand, 3.2, 3.2, YELLOW, 1.0)


def _hat(pen: _Pen) -> None:
    tip, left, right = (32.0, 2.5), (22.5, 20.5), (41.5, 20.5)
    pen.polygon([tip, left, right], RED)
    for low, high in ((0.18, 0.42), (0.66, 0.88)):  # stripes, as shares of the height from the brim
        edge = lambda share, side: (32 + side * 9.5 * (1 - share), 20.5 - 18 * share)  # noqa: E731
        pen.polygon([edge(low, -1), edge(low, 1), edge(high, 1), edge(high, -1)], WHITE)
    pen.outline([tip, left, right], 1.2)
    pen.ellipse(32, 3.6, 3.4, 3.4, YELLOW, 1.0)


def _sky(pen: _Pen, top: str, bottom: str, horizon: float = 64) -> None:
    """A vertical gradient down to the horizon."""
    first, last = (np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) for colour in (top, bottom))
    for row in range(64):
        red, green, blue = (first + (last - first) * min(1.0, row / horizon)).astype(int)
        pen.box(0, row, 64, row + 1.1, f"#{red:02x}{green:02x}{blue:02x}")


def _studio(pen: _Pen, generator: np.random.Generator) -> None:
    pen.box(0, 0, 64, 64, "#f4f1ec")
    pen.box(0, 50, 64, 64, "#dcd6cc")


def _meadow(pen: _Pen, generator: np.random.Generator) -> None:
    _sky(pen, "#7cc4f4", "#e3f5ff", 44)
    pen.ellipse(54, 9, 6, 6, "#ffe98a")
    pen.ellipse(14, 60, 34, 18, "#6cba4d")
    pen.ellipse(54, 62, 32, 18, "#7fcb58")
    for x, y in zip(generator.uniform(3, 61, 9), generator.uniform(52, 62, 9), strict=True):
        pen.ellipse(x, y, 1.1, 1.1, "#fff4fb")


def _night(pen: _Pen, generator: np.random.Generator) -> None:
    _sky(pen, "#141a45", "#434a8c", 50)
    for x, y in zip(generator.uniform(2, 62, 16), generator.uniform(2, 44, 16), strict=True):
        pen.ellipse(x, y, 0.7, 0.7, "#fff7c9")
    pen.ellipse(10, 11, 6, 6, "#fdf3c0")
    pen.ellipse(12.6, 9.6, 5, 5, "#1f2653")
    pen.box(0, 51, 64, 64, "#2b2f5c")


def _beach(pen: _Pen, generator: np.random.Generator) -> None:
    _sky(pen, "#5ec6ee", "#d5f4f6", 30)
    pen.box(0, 30, 64, 48, "#2c8fc9")
    for y in (34.0, 39.0, 44.0):
        start = float(generator.uniform(0, 30))
        pen.line([(start, y), (start + 24, y)], 0.9, "#c8ecf8")
    pen.box(0, 46, 64, 64, "#f3dca0")
    pen.line([(0, 46), (64, 46)], 1.4, "#ffffff")


def _snow(pen: _Pen, generator: np.random.Generator) -> None:
    _sky(pen, "#a9bfd6", "#dde7f0", 50)
    for x in (7.0, 56.0):
        for y, width in ((30.0, 6.0), (38.0, 8.0), (47.0, 10.0)):
            pen.polygon([(x, y - 12), (x - width, y), (x + width, y)], "#3c6b56")
    pen.ellipse(32, 66, 52, 18, "#f8fbff")
    for x, y in zip(generator.uniform(1, 63, 22), generator.uniform(1, 60, 22), strict=True):
        pen.ellipse(x, y, 0.8, 0.8, WHITE)


def _party(pen: _Pen, generator: np.random.Generator) -> None:
    pen.box(0, 0, 64, 64, "#f6b9c8")
    colours = [YELLOW, "#5b8def", WHITE, "#8e5bd0", "#4fb86b"]
    for i, (x, y) in enumerate(zip(generator.uniform(1, 63, 34), generator.uniform(1, 50, 34), strict=True)):
        pen.box(x - 0.9, y - 0.9, x + 0.9, y + 0.9, colours[i % len(colours)])
    pen.box(0, 52, 64, 64, "#b96a86")


def _city(pen: _Pen, generator: np.random.Generator) -> None:
    _sky(pen, "#f58f5f", "#fddc9b", 48)
    left = 0.0
    while left < 64:
        width, top = float(generator.uniform(7, 12)), float(generator.uniform(20, 36))
        pen.box(left, top, left + width, 56, "#6b4a6e")
        for y in np.arange(top + 2.5, 50, 5):
            for x in np.arange(left + 1.8, left + width - 2, 3.6):
                pen.box(float(x), float(y), float(x) + 1.4, float(y) + 2, "#ffd98a")
        left += width + 0.8
    pen.box(0, 52, 64, 64, "#57505e")


def _kitchen(pen: _Pen, generator: np.random.Generator) -> None:
    pen.box(0, 0, 64, 64, "#fbe7a8")
    for column in range(8):
        for row in range(2):
            pen.box(
                8 * column, 50 + 7 * row, 8 * column + 8, 57 + 7 * row, "#ffffff" if (column + row) % 2 else "#3c4a57"
            )
    pen.rounded(4, 7, 19, 25, 1, "#bfe4f7")
    pen.line([(11.5, 7.5), (11.5, 24.5)], 1.0, OUTLINE)
    pen.line([(4.5, 16), (18.5, 16)], 1.0, OUTLINE)


PLACES: list[Callable[[_Pen, np.random.Generator], None]] = [
    _studio,
    _meadow,
    _party,
    _beach,
    _night,
    _snow,
    _city,
    _kitchen,
]
