"""Pictures as latents of a frozen VAE, each encoded once."""

from typing import Any

import torch
from torch import Tensor


class LatentCache:
    """Latents of pictures by their keys, in float32 in the CPU's memory.

    A latent is the mean of the VAE's posterior. Its standard deviation is far below the noise that training adds, and a
    mean needs half the memory of both and no random numbers. Pictures are encoded one by one and in float32: a latent
    depends neither on the batch in which its picture came first nor on the precision of the training then, and a
    resumed run, which begins with an empty cache, finds the very same ones.

    Args:
        vae: An AutoencoderKL.
        enabled: Whether latents are kept; without, every picture is encoded each time.
    """

    def __init__(self, vae: Any, *, enabled: bool) -> None:
        self._vae = vae
        self._enabled = enabled
        self._latents: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, keys: list[str] | None) -> Tensor:
        """The latents of a batch, float32 (B, C, h, w) on its device.

        Args:
            pixels: Pictures (B, 3, H, W) in [-1, 1].
            keys: What the pixels are known under; without keys nothing is kept.
        """
        if keys is None or not self._enabled:
            return self._encode(pixels)
        new = {key: i for i, key in enumerate(keys) if key not in self._latents}
        if new:
            found = self._encode(pixels[list(new.values())]).cpu()
            self._latents |= dict(zip(new, found.unbind(), strict=True))
        return torch.stack([self._latents[key] for key in keys]).to(pixels.device)

    def _encode(self, pixels: Tensor) -> Tensor:
        vae, config = self._vae, self._vae.config
        dtype = vae.dtype
        if dtype != torch.float32:  # float16 overflows in SDXL's
            torch.nn.Module.to(vae, torch.float32)  # diffusers' own `to` would print a warning each time
        with torch.autocast(pixels.device.type, enabled=False):
            means = [vae.encode(one.float()).latent_dist.mode() for one in pixels.split(1)]
        if dtype != torch.float32:
            torch.nn.Module.to(vae, dtype)
        return (torch.cat(means) - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
