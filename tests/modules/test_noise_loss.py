"""The diffusion loss against diffusers' own scheduler and against formulas written out for one number."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lightning_rlora.modules.noise_loss import add_noise, draw_noise, min_snr_weights, velocity, weighted_loss

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TIMES = torch.tensor([0, 17, 400, 801, 999])


def latents(seed):
    return torch.randn(5, 4, 6, 7, generator=torch.Generator().manual_seed(seed))


def test_noisy_latents_and_velocity_are_the_schedulers():
    x, noise, alpha_bar = latents(0), latents(1), SCHEDULER.alphas_cumprod[TIMES]
    # measured: 0
    torch.testing.assert_close(add_noise(x, noise, alpha_bar), SCHEDULER.add_noise(x, noise, TIMES), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        velocity(x, noise, alpha_bar), SCHEDULER.get_velocity(x, noise, TIMES), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_makes_the_error_of_x0_count_min_snr(prediction):
    """The prediction is turned into x_0 by the schedule's definition, and its error weighted as the paper says."""
    x, noise, wrong, gamma = latents(0).double(), latents(1).double(), latents(2).double(), 5.0
    alpha_bar = SCHEDULER.alphas_cumprod[TIMES].double()
    target = noise if prediction == "epsilon" else velocity(x, noise, alpha_bar)
    noisy = add_noise(x, noise, alpha_bar)
    expected = []
    for i, a in enumerate(alpha_bar.tolist()):
        signal, level = math.sqrt(a), math.sqrt(1 - a)
        if prediction == "epsilon":
            x0 = (noisy[i] - level * wrong[i]) / signal
        else:
            x0 = signal * noisy[i] - level * wrong[i]
        expected.append(min(a / (1 - a), gamma) * (x0 - x[i]).square().mean().item())
    weights = min_snr_weights(alpha_bar, gamma, prediction)
    got = weights * (wrong - target).square().mean((1, 2, 3))
    assert got.tolist() == pytest.approx(expected, rel=1e-10)  # measured 3e-14


def test_min_snr_weights_at_the_schedules_ends():
    ends = torch.tensor([0.0, 1e-30, 1 - 1e-7])
    assert min_snr_weights(ends, 5.0, "epsilon").tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-5)
    assert min_snr_weights(ends, 5.0, "v_prediction").tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-5)


def test_every_example_counts_by_its_weight():
    prediction, target = latents(3), latents(4)
    weights = torch.tensor([1.0, 1.0, 0.5, 0.0, 2.0])
    by_hand = sum(
        w * ((p - t) ** 2).double().sum().item() / p.numel()
        for w, p, t in zip(weights.tolist(), prediction, target, strict=True)
    )
    assert weighted_loss(prediction, target, weights).item() == pytest.approx(by_hand / 5, rel=1e-6)
    half = weighted_loss(prediction.bfloat16(), target, weights)
    assert half.dtype == torch.float32


def test_offset_noise_moves_whole_channels():
    x = torch.zeros(4000, 2, 4, 4)
    noise, times = draw_noise(x, 1000, torch.Generator().manual_seed(0), offset=0.5)
    # the mean over 16 pixels has variance 1/16 by itself, and 0.25 more by the offset
    assert noise.mean((2, 3)).var().item() == pytest.approx(1 / 16 + 0.25, rel=0.05)  # measured 0.3 %
    assert (noise - noise.mean((2, 3), keepdim=True)).var().item() == pytest.approx(15 / 16, rel=0.02)
    plain, _ = draw_noise(x, 1000, torch.Generator().manual_seed(0))
    assert plain.mean((2, 3)).var().item() == pytest.approx(1 / 16, rel=0.05)
    assert times.min() >= 0 and times.max() <= 999 and times.dtype == torch.int64
    assert times.float().mean().item() == pytest.approx(499.5, rel=0.03)
