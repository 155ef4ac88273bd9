"""The diffusion loss as pure functions: noise, what the UNet is to predict, and how much each example counts.

A noisy latent at time t is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) n with noise n and the schedule's cumulative product
a_t, `alphas_cumprod` in diffusers. Latents have shape (B, C, h, w); alpha_bar holds a_t of each example, shape (B,).
"""

from typing import Any

import torch
from torch import Tensor


def draw_noise(
    latents: Tensor, timesteps: int, generator: torch.Generator, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Noise and a time for every latent.

    Args:
        latents: Latents (B, C, h, w).
        timesteps: Number of the schedule's timesteps; each is as probable as any other.
        generator: Source of the numbers, on any device.
        offset: Strength of offset noise: one more normal number for each example and channel, added to all its pixels,
            which teaches the model to move the mean brightness.

    Returns:
        Noise like the latents, and times (B,), int64, from 0 to timesteps - 1.
    """
    options: dict[str, Any] = {"device": generator.device, "generator": generator}
    noise = torch.randn(latents.shape, dtype=latents.dtype, **options)
    if offset:
        noise = noise + offset * torch.randn((*latents.shape[:2], 1, 1), dtype=latents.dtype, **options)
    times = torch.randint(timesteps, latents.shape[:1], **options)
    return noise.to(latents.device), times.to(latents.device)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noisy latents sqrt(a) x + sqrt(1 - a) n."""
    signal, level = _levels(alpha_bar)
    return signal * latents + level * noise


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The target of v-prediction, sqrt(a) n - sqrt(1 - a) x (arXiv 2202.00512)."""
    signal, level = _levels(alpha_bar)
    return signal * noise - level * latents


def _levels(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def min_snr_weights(alpha_bar: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weights (B,) that make the squared error of x_0 count min(SNR, gamma), SNR = a / (1 - a) (arXiv 2303.09556).

    An error of the noise is SNR times that of x_0, one of the velocity SNR + 1 times, so the weights of those losses
    are min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1). At SNR = 0 the first is its limit, 1.

    Args:
        alpha_bar: The schedule's cumulative products a at the examples' times, (B,).
        gamma: Upper bound of the SNR's influence; the paper's is 5.
        prediction: `epsilon` or `v_prediction`.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":
        return (gamma / snr).clamp_max(1.0)
    return snr.clamp_max(gamma) / (snr + 1)


def weighted_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The sum over the batch of weight times mean squared error, over B; in float32.

    Args:
        prediction: The UNet's output (B, C, h, w).
        target: What it should be.
        weights: Weight of each example, (B,).
    """
    errors = (prediction.float() - target.float()).square().mean((1, 2, 3))
    return (weights * errors).mean()
