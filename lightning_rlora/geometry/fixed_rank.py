"""The manifold of m x n matrices of rank r, with the metric of the space of all matrices.

Notation: a point is X = U diag(s) V^T, a tangent vector at X is xi = A V^T + U B^T with U^T A = 0. Every function is
pure and batched over leading dimensions, works in the dtype of its input (float32 or float64) and touches nothing
wider than 2r columns. Call them outside autocast, which would turn the matrix products into bfloat16.

Orthonormal bases of [U A] and [V B] come from one Householder QR each. A QR of A alone would not do: where A is
rank-deficient, the columns it invents for the null space need not be orthogonal to U, and the singular vectors of zero
singular values are made of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RANK_TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Singular values at or below this share of the largest count as zero when a tangent vector is orthogonalised.

The polar factor of a rank-deficient matrix is not unique, and its continuation into the null space would be made of
rounding. The shares lie well above the rounding of a QR and an SVD in their dtype.
"""


class Point(NamedTuple):
    """A rank-r matrix X = u diag(s) v^T.

    Attributes:
        u: Orthonormal columns, (..., m, r).
        s: Singular values, positive and descending, (..., r).
        v: Orthonormal columns, (..., n, r).
    """

    u: Tensor
    s: Tensor
    v: Tensor


class Tangent(NamedTuple):
    """A tangent vector xi = a v^T + u b^T at a point (u, s, v), in the gauge u^T a = 0.

    Attributes:
        a: The part that moves the column space, (..., m, r), orthogonal to u.
        b: Everything else, (..., n, r).
    """

    a: Tensor
    b: Tensor


def point_to_dense(point: Point) -> Tensor:
    """Return the matrix X, (..., m, n)."""
    return point.u * point.s[..., None, :] @ point.v.mT


def tangent_to_dense(point: Point, tangent: Tangent) -> Tensor:
    """Return the matrix xi = a v^T + u b^T, (..., m, n)."""
    return tangent.a @ point.v.mT + point.u @ tangent.b.mT


def project(point: Point, z_v: Tensor, zt_u: Tensor) -> Tangent:
    """Project a matrix Z orthogonally onto the tangent space, P(Z) = U U^T Z + Z V V^T - U U^T Z V V^T.

    Args:
        point: Where the tangent space is taken.
        z_v: The product Z V, (..., m, r).
        zt_u: The product Z^T U, (..., n, r).

    Returns:
        The tangent vector with a = (I - U U^T) Z V and b = Z^T U.
    """
    return Tangent(z_v - point.u @ (point.u.mT @ z_v), zt_u)


def inner(x: Tangent, y: Tangent) -> Tensor:
    """Return the Frobenius inner product of two tangent vectors at one point, (...,).

    It is that of the dense matrices: the mixed terms vanish because u^T a = 0.
    """
    return (x.a * y.a).sum((-2, -1)) + (x.b * y.b).sum((-2, -1))


def norm(x: Tangent) -> Tensor:
    """Return the Frobenius norm of a tangent vector, (...,)."""
    return inner(x, x).sqrt()


def transport(start: Point, tangent: Tangent, end: Point) -> Tangent:
    """Carry a tangent vector to another point: project it, as a matrix, onto the tangent space at `end`."""
    z_v = tangent.a @ (start.v.mT @ end.v) + start.u @ (tangent.b.mT @ end.v)
    zt_u = start.v @ (tangent.a.mT @ end.u) + tangent.b @ (start.u.mT @ end.u)
    return project(end, z_v, zt_u)


def retract(point: Point, tangent: Tangent) -> Point:
    """Return the best rank-r approximation of X + xi (in the Frobenius norm).

    If X + xi has a rank below r, some singular values returned are zero (to rounding) and the result lies at the
    edge of the manifold; keeping them away from zero is the caller's choice.
    """
    r = point.s.shape[-1]
    left, r_left = _qr_beside(point.u, tangent.a)
    right, r_right = _qr_beside(point.v, tangent.b)
    # X + xi = (u diag(s) + a) v^T + u b^T = left core right^T
    scaled = r_left[..., :r] * point.s[..., None, :] + r_left[..., r:]
    core = scaled @ r_right[..., :r].mT + r_left[..., :r] @ r_right[..., r:].mT
    p, s, qt = torch.linalg.svd(core, full_matrices=False)
    return Point(left @ p[..., :r], s[..., :r], right @ qt.mT[..., :r])


def orthogonalize(point: Point, tangent: Tangent, tolerance: float | None = None) -> Tangent:
    """Return P_X(Ortho_r(xi)): the polar factor of xi, projected back onto the tangent space.

    Ortho_r replaces the at most 2r nonzero singular values of xi by one. The polar factor leaves the tangent space by
    a matrix with columns outside U and rows outside V, which the projection drops.

    Args:
        point: Where the tangent vector lives.
        tangent: The tangent vector; zero stays zero.
        tolerance: Singular values at or below this share of the largest count as zero; by default `RANK_TOLERANCE`.
    """
    r = point.s.shape[-1]
    if tolerance is None:
        tolerance = RANK_TOLERANCE[tangent.a.dtype]
    left, r_left = _qr_beside(point.u, tangent.a)
    right, r_right = _qr_beside(point.v, tangent.b)
    core = r_left[..., r:] @ r_right[..., :r].mT + r_left[..., :r] @ r_right[..., r:].mT
    p, s, qt = torch.linalg.svd(core, full_matrices=False)
    polar = (p * (s > tolerance * s[..., :1]).to(p.dtype)[..., None, :]) @ qt
    # u = left r_left[:, :r] and v = right r_right[:, :r], so these are Z V and Z^T U of Z = left polar right^T.
    return project(point, left @ (polar @ r_right[..., :r]), right @ (polar.mT @ r_left[..., :r]))


def random_point(
    m: int,
    n: int,
    r: int,
    *,
    batch: Sequence[int] = (),
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Point:
    """Draw points with uniformly distributed singular spaces and singular values uniform in [0.5, 1.5].

    Args:
        m: Number of rows.
        n: Number of columns.
        r: Rank.
        batch: Leading dimensions.
        generator: Source of randomness; numbers are drawn on its device, so that they do not depend on `device`.
        dtype: Of the result.
        device: Of the result.

    Raises:
        ValueError: If the rank is not between 1 and min(m, n).
    """
    if not 1 <= r <= min(m, n):
        raise ValueError(f"A {m} x {n} matrix cannot have rank {r}: choose r from 1 to {min(m, n)}.")

    def gaussian(rows: int) -> Tensor:
        return torch.randn(*batch, rows, r, generator=generator, dtype=dtype, device=generator.device).to(device)

    s = 0.5 + torch.rand(*batch, r, generator=generator, dtype=dtype, device=generator.device).to(device)
    return Point(torch.linalg.qr(gaussian(m)).Q, s.sort(-1, descending=True).values, torch.linalg.qr(gaussian(n)).Q)


def random_tangent(point: Point, *, generator: torch.Generator) -> Tangent:
    """Draw the projection of a standard Gaussian matrix onto the tangent space at `point`."""

    def gaussian_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)

    # For a Gaussian Z the coordinates (I - U U^T) Z V and Z^T U are independent: no m x n matrix is needed.
    return project(point, gaussian_like(point.u), gaussian_like(point.v))


def _qr_beside(basis: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reduced QR of [basis part]; the first r columns of Q span the basis, at most min(rows, 2r) in all."""
    q, r = torch.linalg.qr(torch.cat([basis, part], -1))
    return q, r
