"""Judge a text-to-image pipeline on pictures that it was not trained on.

    python examples/tiny_diffusion/held_out.py --pipeline tiny_diffusion --pictures pictures_*.parquet

prints, for every style and for all pictures, the mean square error of the UNet's prediction (of noise or velocity,
whichever the scheduler names) as JSON. Noise and timesteps come from a generator with a fixed seed, on the CPU: two
pipelines with the same latents see the same noise.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from networks import encode_prompts
from pictures import Pictures, read_pictures
from PIL import Image, ImageDraw

STEPS, GUIDANCE = 25, 4.0


@torch.no_grad()
def prediction_loss(vae, text_encoder, tokenizer, unet, scheduler, pictures: Pictures, draws: int = 8) -> dict:
    """Mean square error of the prediction by style and over `all`, `draws` timesteps a picture, spread evenly."""
    device = unet.device
    generator = torch.Generator().manual_seed(0)
    steps = scheduler.config.num_train_timesteps
    losses = []
    for first in range(0, len(pictures.names), 128):
        part = slice(first, first + 128)
        pixels = pictures.pixels[part].to(device) / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        context = text_encoder(encode_prompts(tokenizer, pictures.captions[part]).to(device))[0]
        errors = []
        for draw in range(draws):
            noise = torch.randn(latents.shape, generator=generator).to(device)
            when = (draw + torch.rand(len(latents), generator=generator)) / draws * steps
            when = when.long().to(device)
            predicted = unet(scheduler.add_noise(latents, noise, when), when, context).sample
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, when) if velocity else noise
            errors.append((predicted - target).float().square().mean((1, 2, 3)))
        losses += torch.stack(errors).mean(0).tolist()
    by_style = {
        style: [loss for loss, other in zip(losses, pictures.styles, strict=True) if other == style]
        for style in sorted(set(pictures.styles))
    }
    return {style: round(sum(part) / len(part), 5) for style, part in {**by_style, "all": losses}.items()}


def draw_sheet(pipeline: StableDiffusionPipeline, prompts: list[str], pictures: list[Image.Image | None], path: Path):
    """A row for every prompt: its words, the true picture where there is one, and six samples."""
    pipeline.set_progress_bar_config(disable=True)
    size, columns, words = 64, 6, 300
    samples = pipeline(
        [prompt for prompt in prompts for _ in range(columns)],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for _ in prompts for seed in range(columns)],
    ).images
    sheet = Image.new("RGB", (words + (columns + 1) * size, len(prompts) * size), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        pen.text((6, row * size + size // 2), prompt[:48], fill="black")
        for column, image in enumerate([picture, *samples[columns * row : columns * (row + 1)]]):
            if image is not None:
                sheet.paste(image.resize((size, size), Image.Resampling.NEAREST), (words + column * size, row * size))
    sheet.save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    parser.add_argument("--split", default="test")
    args = parser.parse_args(arguments)
    pictures = read_pictures(args.pictures, args.split)
    pictures = pictures.choose([i for i, variant in enumerate(pictures.variants) if not variant])
    parts = StableDiffusionPipeline.from_pretrained(args.pipeline)
    parts.to("cuda" if torch.cuda.is_available() else "cpu")
    loss = prediction_loss(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler, pictures)
    print(json.dumps({"prediction_type": parts.scheduler.config.prediction_type, "loss": loss}))


if __name__ == "__main__":
    main()
