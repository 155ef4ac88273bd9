"""Locally optimal initialisation (LOI): the rank-r start whose tangent space holds the most of the gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rlora.adapters import (
    LoraPair,
    find_pairs,
    get_offset,
    group_by_shape,
    read_points,
    track_offsets,
    write_point,
)
from lightning_rlora.adapters.gauge import START
from lightning_rlora.adapters.pairs import is_quantised, matrix, with_shared_base
from lightning_rlora.adapters.probes import Probes, probing
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Point, Svd, randomized_svd

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
        found = _gradient_triplets(pairs, probes, oversampling, power_steps, generator)
    starts = []
    for pair, ((u, s, v), energy) in zip(pairs, found, strict=True):
        r = pair.shape[2]
        size = -0.01 / r**0.5 if alpha is None else alpha
        point = Point(u[:, :r] if size > 0 else -u[:, :r], s.new_full((r,), abs(size)), v[:, r : 2 * r])
        write_point(pair, point)
        if subtract:
            offset = get_offset(pair)
            assert offset is not None
            # from the factors as they were stored, so that X - X0 is zero to the last bit
            offset.subtract(pair.scaling * matrix(pair.b), matrix(pair.a))
        beyond = float(s[2 * r]) if len(s) > 2 * r else 0.0
        starts.append(
            LayerStart(
                name=pair.name,
                captured=float(s[: 2 * r].square().sum()) / energy if energy > 0 else 1.0,
                gap=float(s[2 * r - 1]) / beyond if beyond > 0 else float("inf"),
                gradient_norm=energy**0.5,
                alpha=size,
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
    for batch in group_by_shape(pairs):
        for pair, size in zip(batch, read_points(batch).s[:, 0].tolist(), strict=True):
            if size > 10 * START:
                raise UserError(
                    f"the adapter of layer {pair.name} holds an update already (trained before, or by its "
                    "init_lora_weights), which locally optimal initialisation would throw away: start a new one, or "
                    "leave LocallyOptimalInit out"
                )
    if subtract:
        for pair in with_shared_base(model, pairs):
            raise UserError(
                f"layer {pair.name} shares its base weight with another layer, so it cannot be shifted for one of "
                "them: leave it out of target_modules, or use offset 'none'"
            )


def _gradient_triplets(
    pairs: list[LoraPair], probes: Probes, oversampling: int, power_steps: int, generator: torch.Generator
) -> list[tuple[Svd, float]]:
    """The top singular triplets of every pair's gradient, and an estimate of |G|^2.

    The estimate adds to the energy found the energy outside the range found, seen by a few columns of the first product
    that took no part in finding the range.
    """
    held_out: list[Tensor] = []

    def multiply(omegas: list[Tensor]) -> list[Tensor]:
        if held_out:
            return probes.multiply(omegas)
        extra = [
            torch.randn(len(omega), _HELD_OUT, generator=generator, device=generator.device).to(omega)
            for omega in omegas
        ]
        products = probes.multiply([torch.cat(both, 1) for both in zip(omegas, extra, strict=True)])
        for pair, product in zip(pairs, products, strict=True):
            if not torch.isfinite(product).all():
                raise UserError(f"the loss gradient at layer {pair.name} is not finite: look for bad input data")
        held_out.extend(product[:, -_HELD_OUT:] for product in products)
        return [product[:, :-_HELD_OUT] for product in products]

    triplets = randomized_svd(
        multiply,
        probes.multiply_transposed,
        [pair.shape[:2] for pair in pairs],
        [2 * pair.shape[2] for pair in pairs],
        oversampling=oversampling,
        power_steps=power_steps,
        generator=generator,
        device=pairs[0].b.device,
    )
    energies = []
    for svd, product in zip(triplets, held_out, strict=True):
        product = product.to(svd.u)
        outside = product - svd.u @ (svd.u.mT @ product)
        energies.append(float(svd.s.square().sum() + outside.square().sum() / _HELD_OUT))
    return list(zip(triplets, energies, strict=True))
