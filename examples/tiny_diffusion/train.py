"""Train the embedded text-to-image model `embedded:tiny-diffusion` from scratch on captioned 64 x 64 pictures.

    python examples/tiny_diffusion/train.py --pictures pictures_*.parquet --output tiny_diffusion --minutes 7

First the autoencoder, then UNet and text encoder together in its latents. Both follow the clock: the learning rate
falls to zero along half a cosine while `--minutes` run out. The output is a folder that StableDiffusionPipeline loads,
written anew at every report, so that a run which is stopped leaves its latest state; at the end come `training.json`
and `samples.png`. README.md beside this file names the data.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from held_out import draw_sheet, prediction_loss
from networks import (
    TINY,
    Sizes,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    encode_prompts,
    save_pipeline,
    train_tokenizer,
)
from optimise import optimise
from pictures import Pictures, Prompted, prompts_about, read_pictures, varied
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

VAE_SHARE = 0.3  # of the time
KL_WEIGHT = 2e-3  # enough that the decoder bears small errors of the UNet
EMA = 0.999
WISHES = [
    "a cat",
    "a dog",
    "a red car",
    "a robot on a blue background",
    "an apple on a purple background",
    "a house, fluent 3d style",
]


def reconstruction_loss(pixels: Tensor, rebuilt: Tensor) -> Tensor:
    """L1 of the pixels and of their differences along both axes, which asks for crisp edges."""
    error = rebuilt.float() - pixels
    return error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


@torch.no_grad()
def reconstruction_psnr(vae, pictures: Pictures) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures through the autoencoder, clipped as images are."""
    ratios = []
    for part in pictures.pixels.split(128):
        pixels = part.to(vae.device) / 127.5 - 1
        rebuilt = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(-10 * ((rebuilt - pixels).square().mean((1, 2, 3)) / 4).clamp_min(1e-10).log10())
    return round(torch.cat(ratios).mean().item(), 2)


@torch.no_grad()
def standardise(vae, pictures: Pictures) -> None:
    """Give the latents mean zero, by the 1 x 1 convolutions on both sides of them, and note their deviation."""
    parts = pictures.pixels[torch.randperm(len(pictures.pixels))[:2048]].split(128)
    latents = torch.cat([vae.encode(part.to(vae.device) / 127.5 - 1).latent_dist.mean for part in parts])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 5))


def train_vae(vae, draws: Prompted, generator, autocast, seconds: float, args, test: Pictures) -> list[dict]:
    def loss_of_batch() -> Tensor:
        pixels = varied(draws.sample(args.vae_batch, generator)[0], generator)
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            rebuilt = vae.decode(posterior.sample(generator)).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(pixels, rebuilt) + KL_WEIGHT * kl

    return optimise(
        loss_of_batch,
        list(vae.parameters()),
        seconds,
        args.vae_lr,
        after_step=lambda step: None,
        report=lambda: {"held_out_psnr": reconstruction_psnr(vae, test)},
    )


def train_denoiser(vae, networks, scheduler, draws, generator, autocast, seconds, args, report) -> list[dict]:
    """Train UNet and text encoder; `networks` (unet, text_encoder) end as the running averages of the weights."""
    unet, text_encoder = copy.deepcopy(networks)
    averages = [p for network in networks for p in network.parameters()]
    parameters = [p for network in (unet, text_encoder) for p in network.parameters()]
    for network in networks:
        network.eval()
    vae.requires_grad_(False)

    def loss_of_batch() -> Tensor:
        pixels, ids = draws.sample(args.batch, generator)
        with torch.no_grad(), autocast():
            latents = vae.encode(pixels).latent_dist.sample(generator).float() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        when = torch.randint(
            scheduler.config.num_train_timesteps, (len(noise),), generator=generator, device=noise.device
        )
        with autocast():
            predicted = unet(scheduler.add_noise(latents, noise, when), when, text_encoder(ids)[0]).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, when))

    @torch.no_grad()
    def follow(step: int) -> None:
        torch._foreach_lerp_(averages, parameters, 1 - min(EMA, (1 + step) / (10 + step)))

    return optimise(loss_of_batch, parameters, seconds, args.lr, follow, report)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="parquet files; see pictures.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="from reading to the last sample")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step of UNet and text encoder")
    parser.add_argument("--vae-batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--vae-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="very small networks, to try the script")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(args.seed)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    train, test = read_pictures(args.pictures, "train"), read_pictures(args.pictures, "test")
    test = test.choose([i for i, variant in enumerate(test.variants) if not variant])
    abouts = zip(train.captions, train.names, train.styles, strict=True)
    tokenizer = train_tokenizer([prompt for about in abouts for prompt in prompts_about(*about)])
    draws = Prompted(train, lambda prompts: encode_prompts(tokenizer, prompts), device)
    sizes, pixels = TINY if args.tiny else Sizes(), train.pixels.shape[-1]
    vae = build_vae(sizes, pixels).to(device)
    text_encoder = build_text_encoder(sizes, tokenizer).to(device)
    unet = build_unet(sizes, pixels // 4).to(device)
    scheduler = build_scheduler()
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in {"vae": vae, "text_encoder": text_encoder, "unet": unet}.items()
    }
    print(f"{len(train.names)} pictures, {len(test.names)} held out; parameters {counts}", flush=True)

    prepared = time.perf_counter() - start
    total = 60 * args.minutes
    training = max(
        total - prepared - min(30.0, 0.1 * total), 0.5 * total
    )  # the rest: the last judgement and the samples
    vae_curve = train_vae(vae, draws, generator, autocast, VAE_SHARE * training, args, test)
    standardise(vae, train)

    seen = train.choose(torch.randperm(len(train.names))[: len(test.names)].tolist())
    parts = (vae, text_encoder, tokenizer, unet, scheduler)

    def report() -> dict:
        save_pipeline(args.output, *parts)
        with autocast():
            return {"held_out": prediction_loss(*parts, test)["all"], "seen": prediction_loss(*parts, seen)["all"]}

    remaining = total - min(30.0, 0.1 * total) - (time.perf_counter() - start)
    curve = train_denoiser(
        vae, (unet, text_encoder), scheduler, draws, generator, autocast, max(remaining, 1.0), args, report
    )

    pipeline = StableDiffusionPipeline.from_pretrained(args.output).to(device)
    saved = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, pipeline.scheduler)
    result = {
        "parameters": counts,
        "pictures": len(train.names),
        "batch": args.batch,
        "scaling_factor": vae.config.scaling_factor,
        "held_out_psnr": reconstruction_psnr(pipeline.vae, test),
        "held_out_loss": prediction_loss(*saved, test),
        "seen_loss": prediction_loss(*saved, seen),
        "vae_curve": vae_curve,
        "curve": curve,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    (args.output / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if "curve" not in key}), flush=True)
    few = range(0, len(test.names), max(1, len(test.names) // 16))
    shown = [Image.fromarray(test.pixels[i].permute(1, 2, 0).numpy()) for i in few]
    prompts = WISHES + [test.captions[i] for i in few]
    draw_sheet(pipeline, prompts, [None] * len(WISHES) + shown, args.output / "samples.png")


if __name__ == "__main__":
    main()
