"""The fast step on the fixed-rank manifold between its two passes over tall matrices: small matrices only.

The first pass (`sides`, or the kernels of a GPU) leaves Gram matrices of factors and momentum; from them this makes the
combinations of the tall matrices that the second pass writes. All of it is batched, in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import polar_factor

RANGE_FLOOR = {torch.float32: 1e-12, torch.float64: 1e-28}
"""Directions whose squared norm is at most this share of the whole momentum's are rounding of the tall factors."""

SMALLEST_SQUARE = 1e-60
"""Squared norms up to this count as zero: the inverse of what is smaller would leave float32."""


class Half(NamedTuple):
    """One side of the new momentum at the point.

    Attributes:
        root: Upper triangular R of the point's factor, (L, r, r).
        along: The momentum's part along the point's basis, (L, r, r).
        rest: Root of its part outside the basis, (L, r, r): with an orthonormal Q, the part is Q rest.
        basis: [basis of the point, Q] as combinations of the tall matrices, (L, k, 2r).
    """

    root: Tensor
    along: Tensor
    rest: Tensor
    basis: Tensor


def basis_of(inverse: Tensor, along: Tensor, rest_inverse: Tensor) -> Tensor:
    """[basis of the point, orthonormal basis of N's part outside it] as combinations of [F N], (L, 2r, 2r).

    Args:
        inverse: R^-1 of the factor F's root, (L, r, r); so F R^-1 is the basis of the point.
        along: That basis' products with the momentum N.
        rest_inverse: T such that N's part outside the basis, times T, is orthonormal.
    """
    beside = -inverse @ along @ rest_inverse
    return torch.cat([torch.cat([inverse, beside], 2), torch.cat([torch.zeros_like(beside), rest_inverse], 2)], 1)


class Moved(NamedTuple):
    """The new point and the momentum there, as combinations of the tall matrices.

    Attributes:
        left: Makes [B' M_A'], (L, k, 2r).
        right: Makes [A'^T M_B'], (L, k, 2r).
        sizes: Norms of the columns of B' and A'^T alike, (L, r).
        along: The momentum's part U'^T M V' along both new bases, (L, r, r), which M_B' holds and M_A' leaves out.
    """

    left: Tensor
    right: Tensor
    sizes: Tensor
    along: Tensor


Direction = Callable[[Tensor], Tensor]
"""From the momentum's core to that of the tangent vector to step along. The core of a tangent vector holds its
coordinates in the orthonormal bases [U Qa] and [V Qb], (L, 2r, 2r); its last r x r block is zero."""

Triplets = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""The first r singular triplets p (L, 2r, r), sigma (L, r), q (L, 2r, r) of matrices (L, 2r, 2r), descending."""


def svd_triplets(matrices: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Triplets` by torch's SVD."""
    p, sigma, qt = torch.linalg.svd(matrices)
    return p[..., :r], sigma[..., :r], qt.mT[..., :r]


def eigh_triplets(matrices: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Triplets` to 1e-8, enough for float32, from eigenvalues of squares in half the time, if they are close."""
    squares, q = torch.linalg.eigh(matrices.mT @ matrices)
    squares, q = squares[..., -r:].flip(-1), q[..., -r:].flip(-1)
    if not bool((squares[..., -1] > 1e-8 * squares[..., 0]).all()):
        return svd_triplets(matrices, r)
    sigma = squares.sqrt()
    return matrices @ q / sigma.unsqueeze(-2), sigma, q


def orthogonal_direction(tolerance: float, polar: Callable[[Tensor, float], Tensor] = polar_factor) -> Direction:
    """Riemannion's direction P_X(Ortho_r(M)): the polar factor of the core without its (2, 2) block."""

    def direction(core: Tensor) -> Tensor:
        r = core.shape[-1] // 2
        o = polar(core, tolerance)
        o[:, r:, r:] = 0
        return o

    return direction


def scaled_direction(norm_a: Tensor, norm_b: Tensor, eps: Tensor | float) -> Direction:
    """The momentum with its two tangent factors divided by running averages (L,) of their norms (simulated Adam)."""
    # M_A fills the last r rows of the core, M_B the first
    scale = 1 / (torch.stack([norm_b, norm_a], -1).double() + torch.as_tensor(eps, device=norm_a.device).unsqueeze(-1))

    def direction(core: Tensor) -> Tensor:
        return core * scale.repeat_interleave(core.shape[-1] // 2, -1).unsqueeze(-1)

    return direction


def move(
    left: Half,
    right: Half,
    *,
    scaling: Tensor | float,
    direction: Direction,
    lr: Tensor | float,
    weight_decay: Tensor | float,
    min_singular_value: Tensor | float,
    triplets: Triplets = svd_triplets,
) -> Moved:
    """The whole step between the two passes: X <- retract((1 - lr weight_decay) X - lr D(M)), and M carried along.

    Args:
        left: The left side of the new momentum M.
        right: Its right side.
        scaling: PEFT's c. This and other numbers may differ between the matrices of the batch, (L, 1, 1).
        direction: From the momentum's core to the step's.
        lr: Length of the step.
        weight_decay: Rate at which X shrinks, times lr.
        min_singular_value: Floor of the new point's singular values.
        triplets: How the retraction finds its singular triplets.
    """
    r = left.root.shape[-1]
    # the part of M_A along U drops out: the gauge U^T M_A = 0
    core = left.rest.new_zeros(len(left.rest), 2 * r, 2 * r)
    core[:, :r, :r], core[:, :r, r:], core[:, r:, :r] = right.along.mT, right.rest.mT, left.rest
    moved = -lr * direction(core)
    moved[:, :r, :r] += (1 - lr * weight_decay) * scaling * left.root @ right.root.mT
    p, sigma, q = triplets(moved, r)  # the best rank-r approximation: the retraction
    # signs are free: each column of U keeps its direction, so that averages of factors over steps mean something
    sign = torch.where(p.diagonal(dim1=-2, dim2=-1)[:, None] < 0, -1.0, 1.0)
    p, q = p * sign, q * sign
    sizes = (sigma.unsqueeze(-2).clamp_min(min_singular_value) / scaling).sqrt()

    kq = core @ q
    along = p.mT @ kq
    return Moved(
        left=left.basis @ torch.cat([p * sizes, kq - p @ along], 2),
        right=right.basis @ torch.cat([q * sizes, core.mT @ p], 2),
        sizes=sizes.squeeze(-2),
        along=along,
    )
