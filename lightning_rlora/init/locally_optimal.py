"""Locally optimal initialisation (LOI): the rank-r start whose tangent space holds the most of the gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rlora.adapters import (
    LoraPair,
    find_pairs,
    get_offset,
    matrix,
    refuse_trained,
    track_offsets,
    write_point,
)
from lightning_rlora.adapters.pairs import is_quantised, with_shared_base
from lightning_rlora.adapters.probes import Probes, probing
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Point, Svd, randomized_svd
from lightning_rlora.geometry.randomized_svd import generator_on
from lightning_rlora.geometry.stacks import stacked_by_shape

_HELD_OUT = 8
"""Columns of the first product that estimate how much of the gradient was not found."""


@dataclass(frozen=True)
class LayerStart:
    """What LOI found for one layer.

    Attributes:
        name: Path of the layer.
        captured: Estimated share of |G|^2 in the top 2r singular triplets, all of which the start's tangent space
            holds.
        gap: sigma_2r / sigma_2r+1 of the gradient, infinite where nothing lies beyond.
        gradient_norm: Estimated Frobenius norm of G.
        alpha: Size and sign of the start.
    """

    name: str
    captured: float
    gap: float
    gradient_norm: float
    alpha: float


def locally_optimal_init(
    model: nn.Module,
    backward: Callable[[], object],
    *,
    alpha: float | None = None,
    oversampling: int = 16,
    power_steps: int = 1,
    subtract: bool = True,
    generator: torch.Generator,
) -> list[LayerStart]:
    """Start every LoRA pair at X0 = alpha U_{1..r} V_{r+1..2r}^T, from the top singular triplets of its gradient G.

    The tangent space at X0 contains the best rank-2r approximation of G (arXiv 2507.12142). G is never formed: a
    randomised SVD takes its products with thin matrices from backward passes, 2 (power_steps + 1) runs for all layers
    together.

    Args:
        model: The adapted model, with the base as pretrained.
        backward: Runs the backward passes: adds the gradient of the mean loss over some batches, the same each time and
            with dropout off, to the `.grad` of whatever requires it.
        alpha: All r singular values of the start are |alpha|. By default the paper's -0.01 / sqrt(r).
        oversampling: Extra columns of the sketches beyond 2r.
        power_steps: Power iterations q; each costs two more passes and sharpens the triplets.
        subtract: Shift the base, W' = W - X0, so that the function is unchanged. Otherwise the function moves by X0,
            which is orthogonal to G.
        generator: Source of the sketches.

    Returns:
        One entry a layer.

    Raises:
        UserError: If 2r exceeds min(m, n) of a layer, a base cannot take the offset, or a gradient is not finite.
    """
    pairs = find_pairs(model)
    if alpha == 0:
        raise UserError("alpha = 0 is no point of the manifold: give the start another size")
    _check(model, pairs, subtract=subtract)
    track_offsets(pairs)
    with probing(model, pairs, backward) as probes:
        triplets, energies = _gradient_triplets(pairs, probes, oversampling, power_steps, generator)
    sizes = [-0.01 / pair.shape[2] ** 0.5 if alpha is None else alpha for pair in pairs]
    for pair, svd, size in zip(pairs, triplets, sizes, strict=True):
        _start(pair, svd, size, subtract=subtract)
    return _describe(pairs, triplets, energies, sizes)


def _start(pair: LoraPair, svd: Svd, alpha: float, *, subtract: bool) -> None:
    """Put a pair at X0, and its base at W - X0."""
    u, s, v = svd
    r = pair.shape[2]
    write_point(pair, Point(u[:, :r] if alpha > 0 else -u[:, :r], s.new_full((r,), abs(alpha)), v[:, r : 2 * r]))
    if subtract:
        offset = get_offset(pair)
        assert offset is not None
        # from the factors as they were stored, so that X - X0 is zero to the last bit
        offset.subtract(pair.scaling * matrix(pair.b), matrix(pair.a))


def _describe(
    pairs: list[LoraPair], triplets: list[Svd], energies: list[Tensor], sizes: list[float]
) -> list[LayerStart]:
    """What was found, with one copy from the device for all layers: every other one would wait for it anew."""
    widths = [len(svd.s) for svd in triplets]
    *spectra, found = (
        torch.cat([*(svd.s.double() for svd in triplets), torch.stack(energies)]).cpu().split([*widths, len(energies)])
    )
    starts = []
    for pair, spectrum, energy, alpha in zip(pairs, spectra, found.tolist(), sizes, strict=True):
        top, s = 2 * pair.shape[2], spectrum.tolist()
        beyond = s[top] if len(s) > top else 0.0
        starts.append(
            LayerStart(
                name=pair.name,
                captured=sum(x * x for x in s[:top]) / energy if energy > 0 else 1.0,
                gap=s[top - 1] / beyond if beyond > 0 else float("inf"),
                gradient_norm=energy**0.5,
                alpha=alpha,
            )
        )
    return starts


def _check(model: nn.Module, pairs: list[LoraPair], *, subtract: bool) -> None:
    """Refuse what cannot be started before any pass is run."""
    for pair in pairs:
        m, n, r = pair.shape
        if 2 * r > min(m, n):
            raise UserError(
                f"locally optimal initialisation needs 2r <= min(m, n): layer {pair.name} is {m} x {n}, so at most "
                f"rank {min(m, n) // 2}, not {r}; lower r, or give this layer its own with rank_pattern"
            )
        if subtract and is_quantised(pair):
            raise UserError(f"the base of layer {pair.name} is quantised and cannot be shifted: use offset 'none'")
    refuse_trained(pairs, "locally optimal initialisation")
    if subtract:
        for pair in with_shared_base(model, pairs):
            raise UserError(
                f"layer {pair.name} shares its base weight with another layer, so it cannot be shifted for one of "
                "them: leave it out of target_modules, or use offset 'none'"
            )


def _gradient_triplets(
    pairs: list[LoraPair], probes: Probes, oversampling: int, power_steps: int, generator: torch.Generator
) -> tuple[list[Svd], list[Tensor]]:
    """The top singular triplets of every pair's gradient, and an estimate of |G|^2.

    The estimate adds to the energy found the energy outside the range found, seen by a few columns of the first product
    that took no part in finding the range.
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
