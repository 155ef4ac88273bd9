"""The fast step on the fixed-rank manifold: each tall matrix is read twice and written once.

A batch of L adapters of one shape has products X = c B A with factors B (m, r) and A^T (n, r), loss gradients known
through the factor gradients c G A^T and c G^T B, and a momentum M = M_A V^T + U M_B^T with U^T M_A = 0, in the
orthonormal bases U = B R_B^-1 and V = A^T R_A^-1 of the factors' Cholesky roots.

    pass 1    the Gram matrices of [B  c G A^T  M_A] and [A^T  c G^T B  M_B], each 3r x 3r an adapter
    between   everything else, on matrices of r to 3r columns, in float64
    pass 2    [B' M_A'] = [B  c G A^T  M_A] T_left and [A'^T M_B'] = [A^T  c G^T B  M_B] T_right

The factors are never assumed balanced or orthogonal, since the Gram matrices measure them: the step depends on the
product alone, not on how it is factored, and rounding drift corrects itself. The result is in the balanced gauge.

A Gram matrix in float64 loses what is smaller than 1e-8 of its largest length. Float32 factors do not resolve that
anyway; for float64 ones pass 1 is a QR.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry.gram import cholesky_root, gram, polar_factor, range_root, root_of_range, triangle

RANGE_FLOOR = {torch.float32: 1e-12, torch.float64: 1e-28}
"""Directions whose squared norm is at most this share of the whole momentum's are rounding of the tall factors."""


class Factors(NamedTuple):
    """Tall matrices of one side of a batch: the factor, its gradient and its momentum, each (L, rows, r)."""

    factor: Tensor
    gradient: Tensor
    momentum: Tensor


class Side(NamedTuple):
    """What the first pass leaves of one side: small float64 matrices.

    Attributes:
        root: Upper triangular R with positive diagonal; the basis is factor R^-1, (L, r, r).
        inverse: R^-1.
        along: The basis' products with the gradient and the momentum, side by side, (L, r, 2r).
        rest: What those two hold outside the basis: their Gram matrix (L, 2r, 2r) or, for float64 factors, a matrix
            (L, k, 2r) that has this Gram matrix.
        is_gram: Which of the two `rest` is.
    """

    root: Tensor
    inverse: Tensor
    along: Tensor
    rest: Tensor
    is_gram: bool

    def rest_square(self, new: Tensor) -> Tensor:
        """Of a combination `new` (L, 2r, r) of gradient and momentum: the squared norm, (L,), outside the basis."""
        squares = (new.mT @ self.rest @ new).diagonal(dim1=-2, dim2=-1) if self.is_gram else (self.rest @ new).square()
        return squares.flatten(1).sum(-1).clamp_min(0)

    def rest_root(self, new: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Of the same combination: R with R^T R the Gram matrix of its part outside the basis, and R's inverse."""
        return range_root(new.mT @ self.rest @ new, floor) if self.is_gram else root_of_range(self.rest @ new, floor)


class Measured(NamedTuple):
    """What the first pass leaves of a batch.

    Attributes:
        left: Of B, its gradient and M_A; the basis is U.
        right: Of A^T, its gradient and M_B; the basis is V.
        norm_a, norm_b: Frobenius norms of the two tangent factors of P_X(G), (L,).
    """

    left: Side
    right: Side
    norm_a: Tensor
    norm_b: Tensor

    @property
    def tangent_norm(self) -> Tensor:
        """Frobenius norm of P_X(G), (L,)."""
        return torch.hypot(self.norm_a, self.norm_b)


class Core(NamedTuple):
    """The momentum in orthonormal bases [U Qa], [V Qb] as blocks: [[u_v, u_qb], [qa_v, 0]], each (L, r, r).

    Attributes:
        qa_v: Coordinates of M_A.
        u_v, u_qb: Coordinates of M_B.
    """

    u_v: Tensor
    u_qb: Tensor
    qa_v: Tensor

    def dense(self) -> Tensor:
        """The core as one matrix (L, 2r, 2r)."""
        top = torch.cat([self.u_v, self.u_qb], -1)
        return torch.cat([top, torch.cat([self.qa_v, torch.zeros_like(self.qa_v)], -1)], -2)


Direction = Callable[[Core], Core]
"""From the momentum's core to the core of the tangent vector to step along (its (2, 2) block is zero)."""


def orthogonal_direction(tolerance: float) -> Direction:
    """Riemannion's direction P_X(Ortho_r(M)): the polar factor of the core without its (2, 2) block."""

    def direction(core: Core) -> Core:
        r = core.u_v.shape[-1]
        o = polar_factor(core.dense(), tolerance)
        return Core(u_v=o[:, :r, :r], u_qb=o[:, :r, r:], qa_v=o[:, r:, :r])

    return direction


def scaled_direction(norm_a: Tensor, norm_b: Tensor, eps: float) -> Direction:
    """The momentum with its two tangent factors divided by running averages (L,) of their norms (simulated Adam)."""
    scale_a, scale_b = (1 / (norm.double() + eps)[:, None, None] for norm in (norm_a, norm_b))

    def direction(core: Core) -> Core:
        return Core(u_v=core.u_v * scale_b, u_qb=core.u_qb * scale_b, qa_v=core.qa_v * scale_a)

    return direction


def measure(left: Factors, right: Factors, scaling: float) -> Measured:
    """Pass 1: everything the step needs to know of the tall matrices."""
    on_left, on_right = _measure_side(left), _measure_side(right)
    # the tangent factors of P(G) are (1 - U U^T) G V and G^T U, with G V = (c G A^T) R_A^-1 / c and likewise G^T U
    g_v, gt_u = (torch.cat([x.inverse, torch.zeros_like(x.inverse)], 1) / scaling for x in (on_right, on_left))
    norm_a = on_left.rest_square(g_v).sqrt()
    norm_b = (on_right.rest_square(gt_u) + (on_right.along @ gt_u).square().sum((1, 2))).sqrt()
    return Measured(on_left, on_right, norm_a, norm_b)


def _measure_side(side: Factors) -> Side:
    r = side.factor.shape[-1]
    tall = torch.cat(side, -1)
    if tall.dtype == torch.float64:
        root, inverse, beside, below = triangle(tall, r)
        return Side(root, inverse, beside, below, is_gram=False)
    n = gram(tall)
    root, inverse = cholesky_root(n[:, :r, :r])
    along = inverse.mT @ n[:, :r, r:]
    return Side(root, inverse, along, n[:, r:, r:] - along.mT @ along, is_gram=True)


def advance(
    left: Factors,
    right: Factors,
    measured: Measured,
    *,
    scaling: float,
    direction: Direction,
    lr: float,
    momentum: float,
    gradient_weight: Tensor | float,
    weight_decay: float,
    turn_left: Tensor | None = None,
    turn_right: Tensor | None = None,
    min_singular_value: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The step from pass 1 on: M <- momentum M + gradient_weight P(G), X <- retract((1 - lr weight_decay) X - lr D(M)).

    The momentum is carried to the new point by projection, as it was before `direction`.

    Args:
        left: B, its gradient and M_A.
        right: A^T, its gradient (transposed) and M_B.
        measured: What `measure` returned for them.
        scaling: PEFT's c.
        direction: From the momentum's core to the step's.
        lr: Length of the step.
        momentum: Share of the old momentum that is kept.
        gradient_weight: Weight of the new gradient.
        weight_decay: Rate at which X shrinks, times lr.
        turn_left: If the factors were re-factored from outside since M was stored: (L, r, r), the old U in the new, U^T
            U_old (M_B is a set of coefficients on U). Rotations keep M; zeros forget it.
        turn_right: Likewise V^T V_old, for M_A.
        min_singular_value: Floor of the new point's singular values.

    Returns:
        B' (L, m, r), A'^T (L, n, r), M_A' and M_B', in the dtype of the factors; and the norms of the columns of B' and
        A'^T alike, (L, 1, r) in float64.
    """
    r = left.factor.shape[-1]
    dtype = left.factor.dtype
    eye = torch.eye(r, dtype=torch.float64, device=left.factor.device).expand(len(left.factor), r, r)
    zero = torch.zeros_like(eye)
    floor = RANGE_FLOOR[dtype]

    def momentum_on(side: Side, other: Side, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One side of the momentum: its part along the point, an orthonormal basis of [point, rest], the rest in it."""
        kept = momentum * (eye if turn is None else turn.mT)
        new = torch.cat([gradient_weight / scaling * other.inverse, kept], 1)  # coefficients on gradient and momentum
        along = side.along @ new
        whole = side.rest_square(new) + along.square().sum((1, 2))
        root, inverse = side.rest_root(new, floor * whole)
        basis = torch.cat([-side.inverse @ along, new], 1) @ inverse
        return along, torch.cat([torch.cat([side.inverse, zero, zero], 1), basis], 2), root

    # the part of M_A along U drops out: the gauge U^T M_A = 0
    _, basis_left, qa_v = momentum_on(measured.left, measured.right, turn_right)
    along, basis_right, qb_u = momentum_on(measured.right, measured.left, turn_left)
    core = Core(u_v=along.mT, u_qb=qb_u.mT, qa_v=qa_v)

    step = direction(core)
    point = (1 - lr * weight_decay) * scaling * measured.left.root @ measured.right.root.mT
    moved = Core(u_v=point - lr * step.u_v, u_qb=-lr * step.u_qb, qa_v=-lr * step.qa_v).dense()
    p, sigma, qt = torch.linalg.svd(moved)  # the best rank-r approximation: the retraction
    # signs are free: each column of U keeps its direction, so that averages of factors over steps mean something
    sign = torch.where(p.diagonal(dim1=-2, dim2=-1)[:, None, :r] < 0, -1.0, 1.0)
    p, q = p[:, :, :r] * sign, qt.mT[:, :, :r] * sign
    root = (sigma[:, :r].clamp_min(min_singular_value) / scaling).sqrt().unsqueeze(-2)

    k = core.dense()
    kq = k @ q
    t_left = basis_left @ torch.cat([p * root, kq - p @ (p.mT @ kq)], 2)
    t_right = basis_right @ torch.cat([q * root, k.mT @ p], 2)
    new_left = torch.cat(left, -1) @ t_left.to(dtype)
    new_right = torch.cat(right, -1) @ t_right.to(dtype)
    return new_left[..., :r], new_right[..., :r], new_left[..., r:], new_right[..., r:], root
