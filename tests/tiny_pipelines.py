"""Tiny diffusers pipelines from configs, with random weights, saved as folders: the layouts of SD 1.5, 2 and XL."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "sks"]
LENGTH = 12  # tokens that a prompt may have, with its start and end


def tokenizer() -> CLIPTokenizer:
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=LENGTH)


def text_config(hidden: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=1,
        initializer_range=0.2,
    )


def build(kind: str, channels: tuple[int, ...] = (16, 32), **unet: Any) -> Any:
    """A pipeline for images of 16 x 16 pixels, latents of 8 x 8; `kind` is sd15, sd2 or sdxl."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2" else "epsilon",
    )
    options: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    if kind != "sdxl":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config(16)).eval(),
            tokenizer=tokenizer(),
            unet=UNet2DConditionModel(**options, cross_attention_dim=16, use_linear_projection=kind == "sd2", **unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    options |= {
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 8,
    }
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(8)).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(**options, **unet),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def saved(folder: Path, kind: str = "sd15", **options: Any) -> str:
    build(kind, **options).save_pretrained(folder)
    return str(folder)


def batch(seed: int = 0, size: int = 4, height: int = 16, width: int = 16) -> dict[str, Any]:
    """A batch as the data modules collate it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(size, 3, height, width, generator=generator) * 2 - 1
    return {
        "pixel_values": pixels,
        "prompt": [f"a photo of {WORDS[3 + i % 5]}" for i in range(size)],
        "weight": torch.ones(size),
        "key": [f"{seed}/{i}" for i in range(size)],
        "original_size": torch.tensor([[height, width]] * size),
        "crop_top_left": torch.zeros(size, 2, dtype=torch.int64),
    }


def images(pipeline: Any, seeds: list[int], prompt: str = "a photo of sks dog") -> Tensor:
    """What a stock pipeline makes for a prompt, (images, 3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [prompt] * len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3,
        output_type="pt",
    ).images
