"""Captioned 64 x 64 pictures: reading them, prompts about them, batches drawn on the device that holds them all."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# How a picture is spoken of; `a` is the article of its name.
PROMPTS = (
    "{caption}",
    "{name}",
    "{a} {name}",
    "a picture of {a} {name}",
    "{name}, {style} style",
    "a {style} picture of {a} {name}",
)
BACKGROUNDS = {
    "red": (230, 70, 60),
    "orange": (250, 160, 60),
    "yellow": (250, 220, 90),
    "green": (110, 190, 100),
    "blue": (90, 150, 230),
    "purple": (160, 110, 200),
    "pink": (250, 170, 200),
    "brown": (150, 110, 80),
    "grey": (170, 170, 170),
    "black": (30, 30, 30),
}
ONE_WAY_GROUPS = {"Symbols", "Flags", "gui"}  # arrows and letters: never mirrored
SHIFT = 4  # pixels by which a picture may move; whole pixels, since resampling would teach blur
COLOURED = 0.2  # share of pictures that get a coloured background
UNPROMPTED = 0.1  # share of empty prompts, which classifier-free guidance needs
VARIANT_WEIGHT = 0.15  # how often a skin-tone variant is drawn, next to 1


class Pictures(NamedTuple):
    """Pictures and what is said of them; `pixels` uint8 (N, 3, 64, 64)."""

    pixels: Tensor
    captions: list[str]
    names: list[str]
    styles: list[str]
    groups: list[str]
    variants: list[bool]  # skin-tone variants of another picture

    def choose(self, wanted: list[int]) -> "Pictures":
        return Pictures(self.pixels[wanted], *([column[i] for i in wanted] for column in self[1:]))


def read_pictures(paths: list[Path], split: str) -> Pictures:
    """The rows of a split. Columns: image (bytes of a file), caption, name, style, group, skin_tone, split."""
    columns = ["image", "caption", "name", "style", "group", "skin_tone"]
    tables = [pyarrow.parquet.read_table(path, columns=[*columns, "split"]).to_pylist() for path in paths]
    rows = [row for table in tables for row in table if row["split"] == split]
    if not rows:
        raise SystemExit(f"no picture of split {split!r} in {', '.join(map(str, paths))}")
    arrays = [np.array(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, *([row[column] for row in rows] for column in columns[1:]))


def prompts_about(caption: str, name: str, style: str) -> list[str]:
    """Every prompt for one picture: as it is, then once for each coloured background."""
    words = {"caption": caption, "name": name, "a": article(name), "style": style.replace("-", " ")}
    plain = [prompt.format(**words) for prompt in PROMPTS]
    return plain + [
        f"{plain[1 + i % 4]} on {article(colour)} {colour} background" for i, colour in enumerate(BACKGROUNDS)
    ]


def article(noun: str) -> str:
    return "an" if noun[:1].lower() in {*"aeiou"} else "a"


def backdrop(pixels: Tensor) -> Tensor:
    """Where the white around the object is: bool (N, 1, H, W), the nearly white pixels that reach the border."""
    white = pixels.amin(1, keepdim=True) >= 250
    reached = torch.zeros_like(white)
    reached[..., [0, -1], :] = white[..., [0, -1], :]
    reached[..., [0, -1]] = white[..., [0, -1]]
    for _ in range(pixels.shape[-1]):
        reached = F.max_pool2d(reached.float(), 3, 1, 1).bool() & white
    return reached


class Prompted:
    """Batches of pictures with token ids of prompts, both drawn with a generator of the device.

    Styles are drawn equally often, whatever their number of pictures.

    Args:
        pictures: What to draw from; moved to the device.
        encode: Token ids (len(prompts), length) of a list of prompts.
        device: Where everything lies.
    """

    def __init__(self, pictures: Pictures, encode: Callable[[list[str]], Tensor], device: torch.device):
        self.pixels = pictures.pixels.to(device)
        self.edge = torch.cat([F.max_pool2d(backdrop(part).float(), 3, 1, 1).bool() for part in self.pixels.split(512)])
        weight = torch.tensor([VARIANT_WEIGHT if variant else 1.0 for variant in pictures.variants])
        _, style = np.unique(pictures.styles, return_inverse=True)
        style = torch.from_numpy(style)
        self.weight = (weight / torch.bincount(style, weight)[style]).float().to(device)
        self.mirrored = torch.tensor([group not in ONE_WAY_GROUPS for group in pictures.groups], device=device)
        self.has_backdrop = self.edge.float().mean((1, 2, 3)) > 0.15
        self.colours = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
        prompts = [
            prompts_about(*about) for about in zip(pictures.captions, pictures.names, pictures.styles, strict=True)
        ]
        ids = encode([prompt for about in prompts for prompt in about])
        self.ids = ids.view(len(prompts), len(PROMPTS) + len(BACKGROUNDS), -1).to(device)
        self.no_prompt = encode([""]).to(device)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1], float32 (batch, 3, H, W), and token ids (batch, length)."""
        device = self.pixels.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        index = torch.multinomial(self.weight, batch, replacement=True, generator=generator)
        coloured = (uniform(batch) < COLOURED) & self.has_backdrop[index]
        colour = (uniform(batch) * len(BACKGROUNDS)).long()
        prompt = torch.where(coloured, len(PROMPTS) + colour, (uniform(batch) * len(PROMPTS)).long())
        ids = torch.where(uniform(batch, 1) < UNPROMPTED, self.no_prompt, self.ids[index, prompt])

        pixels = self.pixels[index].float() / 255
        painted = coloured[:, None, None, None] & self.edge[index]  # the product keeps the object's soft outline
        pixels = torch.where(painted, pixels * self.colours[colour][:, :, None, None], pixels)
        mirrored = (uniform(batch) < 0.5) & self.mirrored[index]
        return moved(pixels, mirrored, generator) * 2 - 1, ids


def moved(pixels: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures (B, 3, S, S), shifted by whole pixels (the border repeated), mirrored where told."""
    batch, _, size, _ = pixels.shape
    device = pixels.device
    shift = torch.randint(-SHIFT, SHIFT + 1, (2, batch, 1), generator=generator, device=device)
    shift = shift * torch.randint(0, 2, (1, batch, 1), generator=generator, device=device)
    rows, columns = (torch.arange(size, device=device) + shift).clamp(0, size - 1)
    columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    every = torch.arange(batch, device=device)[:, None, None]
    return pixels[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] as an autoencoder should also know them, nearer to photos.

    Most are left alone. The others are zoomed in or out and blended with their neighbour in the batch along a soft
    random mask, and their colours are permuted, dimmed and shifted.
    """
    batch, _, size, _ = pixels.shape
    device = pixels.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    scale = 0.6 + 0.9 * uniform(batch, 1)
    centre = (1 - scale) * (2 * uniform(batch, 2) - 1)
    affine = torch.diag_embed(scale.expand(-1, 2))
    grid = F.affine_grid(torch.cat([affine, centre[:, :, None]], 2), list(pixels.shape), align_corners=False)
    zoomed = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    mask = F.interpolate(uniform(batch, 1, 5, 5), size=(size, size), mode="bicubic", align_corners=False)
    mask = torch.sigmoid(12 * (mask - 0.35))
    blended = mask * zoomed + (1 - mask) * zoomed.roll(1, 0)
    channels = uniform(batch, 3).argsort(1)
    blended = blended.gather(1, channels[:, :, None, None].expand_as(blended))
    blended = (blended * (0.4 + 0.6 * uniform(batch, 1, 1, 1)) + 0.4 * (2 * uniform(batch, 3, 1, 1) - 1)).clamp(-1, 1)
    return torch.where(uniform(batch, 1, 1, 1) < 0.6, pixels, blended)
