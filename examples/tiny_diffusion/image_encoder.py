"""Train a small image encoder for image similarity, where DINO is out of reach: a ViT by contrast, without a teacher.

    python examples/tiny_diffusion/image_encoder.py --pictures pictures_*.parquet --photos photos --output image_encoder

Two crops of one picture, or of two pictures of the same name, are to lie close, all others apart (SimCLR's loss,
arXiv 2002.05709, with pairs of the same name counted neither way). `--photos` names folders with a folder of photos for
each subject. The output loads with `transformers.AutoModel` and `AutoImageProcessor`; the first token of
`last_hidden_state` is the embedding, to be compared by cosine, as DINO's is.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from optimise import optimise
from pictures import Pictures, read_pictures
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

TEMPERATURE = 0.1
SAME_NAME = 0.5  # share of pairs that may be two pictures of a name
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def read_photos(folders: list[Path], size: int) -> Pictures:
    """Photos below the folders, cut to squares; a photo's folder is its name."""
    files = [path for folder in folders for path in sorted(folder.rglob("*.jp*g"))]
    if not files:
        raise SystemExit(f"no JPEG below {', '.join(map(str, folders))}")
    arrays = [np.array(ImageOps.fit(Image.open(path).convert("RGB"), (size, size))) for path in files]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    names = [f"photo of {path.parent.name}" for path in files]
    return Pictures(pixels, names, names, ["photo"] * len(files), [""] * len(files), [False] * len(files))


def build_encoder(size: int, tiny: bool) -> ViTModel:
    """A ViT of 2.7 million parameters with patches of 8 x 8 pixels."""
    width, layers = (32, 1) if tiny else (192, 6)
    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    return ViTModel(config)


def crops(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of pictures (B, 3, S, S) in [-1, 1], mirrored, with other light and colours."""
    batch, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    scale = uniform(0.55, 1.05, 1) * uniform(0.9, 1.1, 2)
    centre = (1 - scale).clamp_min(0) * uniform(-1, 1, 2)
    scale = scale * torch.cat([uniform(-1, 1, 1).sign(), torch.ones_like(centre[:, :1])], 1)  # a negative width mirrors
    grid = F.affine_grid(torch.cat([torch.diag_embed(scale), centre[:, :, None]], 2), list(pixels.shape), False)
    cut = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    grey = cut.mean(1, keepdim=True)
    saturation = uniform(0.6, 1.4, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) > 0.1)
    cut = (grey + saturation * (cut - grey)) * uniform(0.7, 1.3, 1, 1, 1)
    return (cut + uniform(-0.2, 0.2, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)).clamp(-1, 1)


def contrast(left: Tensor, right: Tensor, names: Tensor) -> Tensor:
    """InfoNCE of two views (B, d) both ways; other pairs of the same name (B,) count neither for nor against."""
    logits = (F.normalize(left, dim=1) @ F.normalize(right, dim=1).T).float() / TEMPERATURE
    twins = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool, device=names.device)
    logits = logits.masked_fill(twins, float("-inf"))
    target = torch.arange(len(names), device=names.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


@torch.no_grad()
def retrieval(embed, pictures: Pictures, device: torch.device) -> dict[str, float]:
    """How often the nearest picture is the right one: for a crop its whole, for a picture another of its name."""
    generator = torch.Generator(device).manual_seed(0)
    pixels = pictures.pixels.to(device) / 127.5 - 1
    whole = F.normalize(embed(pixels).float(), dim=1)
    cut = F.normalize(embed(crops(pixels, generator)).float(), dim=1)
    itself = torch.arange(len(whole), device=device)
    _, names = np.unique([name.lower() for name in pictures.names], return_inverse=True)
    names = torch.from_numpy(names).to(device)
    paired = torch.bincount(names)[names] > 1
    nearest = (whole @ whole.T).fill_diagonal_(-2).argmax(1)
    return {
        "crop_to_whole": round(((cut @ whole.T).argmax(1) == itself).float().mean().item(), 4),
        "same_name": round((names[nearest] == names)[paired].float().mean().item(), 4) if paired.any() else 0.0,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="parquet files; see pictures.py")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of folders of photos")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=1024, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a very small network, to try the script")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(args.seed)
    train, test = read_pictures(args.pictures, "train"), read_pictures(args.pictures, "test")
    test = test.choose([i for i, variant in enumerate(test.variants) if not variant])
    size = train.pixels.shape[-1]
    if args.photos:
        photos = read_photos(args.photos, size)
        train = Pictures(
            torch.cat([train.pixels, photos.pixels]), *(a + b for a, b in zip(train[1:], photos[1:], strict=True))
        )

    # Pictures in the order of their names: those of one name lie between first[name] and first[name] + count[name].
    _, names = np.unique([name.lower() for name in train.names], return_inverse=True)
    order = np.argsort(names, kind="stable")
    train, names = train.choose(order.tolist()), torch.from_numpy(names[order]).to(device)
    count = torch.bincount(names)
    first = count.cumsum(0) - count
    pixels = train.pixels.to(device)
    _, style = np.unique(train.styles, return_inverse=True)
    style = torch.from_numpy(style).to(device)
    weight = 1 / torch.bincount(style)[style].float()  # styles are drawn equally often

    encoder = build_encoder(size, args.tiny).to(device)
    width = encoder.config.hidden_size
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 128)).to(device)

    def embed(views: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return encoder(pixel_values=views).last_hidden_state[:, 0]

    def loss_of_batch() -> Tensor:
        index = torch.multinomial(weight, args.batch, replacement=True, generator=generator)
        name = names[index]
        luck = torch.rand(2, args.batch, generator=generator, device=device)
        other = torch.where(luck[0] < SAME_NAME, first[name] + (luck[1] * count[name]).long(), index)
        views = [crops(pixels[each].float() / 127.5 - 1, generator) for each in (index, other)]
        left, right = head(embed(torch.cat(views)).float()).chunk(2)
        return contrast(left, right, name)

    print(
        f"{len(train.names)} pictures of {len(count)} names; {sum(p.numel() for p in encoder.parameters())} parameters"
    )
    by_pixels = retrieval(lambda views: views.flatten(1), test, device)
    seconds = max(60 * args.minutes - (time.perf_counter() - start), 1.0)
    parameters = [*encoder.parameters(), *head.parameters()]
    curve = optimise(
        loss_of_batch, parameters, seconds, args.lr, lambda step: None, lambda: retrieval(embed, test, device)
    )
    encoder.to("cpu").save_pretrained(args.output)
    processor = PROCESSOR | {"size": {"height": size, "width": size}}
    (args.output / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    result = {"batch": args.batch, "held_out_by_raw_pixels": by_pixels, "curve": curve}
    (args.output / "training.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
