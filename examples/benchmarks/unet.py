"""UNets of Stable Diffusion 1.5, 2 and XL with random weights (or narrower), and noisy latents to train them on."""

from typing import Any, NamedTuple

import torch
from bench import DEVICE
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPT = 77
"""Tokens of a prompt."""

STABLE_DIFFUSION: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What each UNet's configuration has beside the defaults, which are those of Stable Diffusion 1."""


class Latents(NamedTuple):
    """A batch of noisy latents with what the UNet is told of them, and the noise."""

    noisy: Tensor
    times: Tensor
    told: dict[str, Any]
    noise: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """The mean squared error of the noise."""
        return (model(self.noisy, self.times, **self.told).sample.float() - self.noise).square().mean()


def stable_diffusion(kind: str, shrink: int = 1) -> dict[str, Any]:
    """The UNet's configuration; `shrink` divides the channels, for which it is taken to be a power of two up to 16."""
    config = dict(STABLE_DIFFUSION[kind])
    if shrink > 1:
        channels = config.get("block_out_channels", [320, 640, 1280, 1280])
        config |= {"block_out_channels": [c // shrink for c in channels], "norm_num_groups": 4, "sample_size": 16}
        if config["attention_head_dim"] == 8:
            config["attention_head_dim"] = 5  # heads that divide 320 / 16
    return config


def adapted_unet(config: dict[str, Any], rank: int) -> nn.Module:
    """A UNet with random weights in bfloat16, made on the device, and float32 LoRA factors on its attention layers."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(**config).to(torch.bfloat16)
    model = get_peft_model(unet, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model.train()


def random_latents(config: dict[str, Any], batch: int) -> Latents:
    """Random numbers in the place of pictures and prompts."""
    size, options = config["sample_size"], {"device": DEVICE, "dtype": torch.bfloat16}
    told: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(batch, PROMPT, config["cross_attention_dim"], **options)
    }
    if "addition_time_embed_dim" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        time_ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], **options).repeat(batch, 1)
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled, **options), "time_ids": time_ids}
    noise = torch.randn(batch, 4, size, size, **options)
    return Latents(torch.randn_like(noise), torch.randint(1000, (batch,), device=DEVICE), told, noise)
