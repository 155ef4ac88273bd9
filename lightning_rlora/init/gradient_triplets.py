"""The leading singular triplets of the loss gradients of all layers, which are never formed."""

import torch
from torch import Tensor

from lightning_rlora.adapters import LoraPair
from lightning_rlora.adapters.probes import Probes
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Svd, randomized_svd
from lightning_rlora.geometry.randomized_svd import generator_on
from lightning_rlora.geometry.stacks import stacked_by_shape

_HELD_OUT = 8
"""Columns of the first product that estimate how much of the gradient was not found."""


def check_ranks(pairs: list[LoraPair], start: str) -> None:
    """Refuse layers whose gradient has fewer than 2r singular triplets."""
    for pair in pairs:
        m, n, r = pair.shape
        if 2 * r > min(m, n):
            raise UserError(
                f"{start} needs 2r <= min(m, n): layer {pair.name} is {m} x {n}, so at most "
                f"rank {min(m, n) // 2}, not {r}; lower r, or give this layer its own with rank_pattern"
            )


def gradient_triplets(
    pairs: list[LoraPair], probes: Probes, oversampling: int, power_steps: int, generator: torch.Generator
) -> tuple[list[Svd], list[Tensor]]:
    """The top singular triplets of every pair's gradient, and an estimate of |G|^2.

    The estimate adds to the energy found the energy outside the range found, seen by a few columns of the first product
    that took no part in finding the range.

    Args:
        pairs: The pairs, each of a rank r.
        probes: Probes of these pairs; 2 (power_steps + 1) passes are run.
        oversampling: Extra columns of the sketches beyond 2r.
        power_steps: Power iterations.
        generator: Source of the sketches.

    Returns:
        Of each pair at least 2r triplets, the largest first, and |G|^2.

    Raises:
        UserError: If a gradient is not finite.
    """
    device = pairs[0].b.device
    generator = generator_on(device, generator)
    held_out: list[Tensor] = []

    def multiply(omegas: list[Tensor]) -> list[Tensor]:
        if held_out:
            return probes.multiply(omegas)
        wider = []
        for omega in omegas:
            extra = torch.randn(len(omega), _HELD_OUT, generator=generator, dtype=omega.dtype, device=device)
            wider.append(torch.cat([omega, extra], 1))
        products = probes.multiply(wider)
        finite = torch.stack([product.abs().amax().to(device) for product in products]).isfinite().tolist()
        for pair, is_finite in zip(pairs, finite, strict=True):
            if not is_finite:
                raise UserError(f"the loss gradient at layer {pair.name} is not finite: look for bad input data")
        # copies: a view would keep the whole product
        held_out.extend(product[:, -_HELD_OUT:].to(device, copy=True) for product in products)
        return [product[:, :-_HELD_OUT] for product in products]

    triplets = randomized_svd(
        multiply,
        probes.multiply_transposed,
        [pair.shape[:2] for pair in pairs],
        [2 * pair.shape[2] for pair in pairs],
        oversampling=oversampling,
        power_steps=power_steps,
        generator=generator,
        device=device,
    )

    def energy(u: Tensor, s: Tensor, product: Tensor) -> tuple[Tensor]:
        u, product = u.double(), product.double()
        outside = product - u @ (u.mT @ product)
        return (s.double().square().sum(-1) + outside.square().sum((-2, -1)) / _HELD_OUT,)

    us, spectra, _ = zip(*triplets, strict=True)
    return triplets, [total for (total,) in stacked_by_shape(energy, us, spectra, held_out)]
