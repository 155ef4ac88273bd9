"""Locally optimal initialisation (LOI): the rank-r start whose tangent space holds the most of the gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rlora.adapters import (
    LoraPair,
    check_shiftable,
    find_pairs,
    refuse_trained,
    subtract_start,
    track_offsets,
    write_point,
)
from lightning_rlora.adapters.probes import probing
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Point, Svd
from lightning_rlora.init.gradient_triplets import check_ranks, gradient_triplets


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
    check_ranks(pairs, "locally optimal initialisation")
    if subtract:
        check_shiftable(model, pairs)
    refuse_trained(pairs, "locally optimal initialisation")
    track_offsets(pairs)
    with probing(model, pairs, backward) as probes:
        triplets, energies = gradient_triplets(pairs, probes, oversampling, power_steps, generator)
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
        subtract_start(pair)


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
