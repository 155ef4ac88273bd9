"""The oracle of the whitened step: the iteration on full m x n matrices in float64, in plain coordinates.

Nothing is brought into a frame here, and the fixed-rank point is never factored: the metric's own projections, polar
factor and best approximation are written with full matrices, each by an SVD.
"""

from typing import NamedTuple

import torch
from dense_steps import ortho, tangent_part
from torch import Tensor


class Whitened(NamedTuple):
    """X, the momentum M (a matrix like the gradient), and running means p (m,), q (n,) of squared rows and columns."""

    x: Tensor
    m: Tensor
    p: Tensor
    q: Tensor
    steps: int


def whitened_start(x: Tensor) -> Whitened:
    return Whitened(x, torch.zeros_like(x), x.new_zeros(len(x)), x.new_zeros(x.shape[1]), 0)


def fourth_root(mean_squares: Tensor, steps: int, decay: float, floor: float) -> Tensor:
    """diag(p^(1/4)) of the bias-corrected means with their floor, scaled to mean 1."""
    if steps == 0 or not mean_squares.any():
        return torch.eye(len(mean_squares), dtype=torch.float64)
    corrected = mean_squares / (1 - decay**steps)
    root = (corrected + floor * corrected.mean()) ** 0.25
    return torch.diag(root / root.mean())


def whitened_step(
    d: Whitened,
    g: Tensor,
    r: int,
    *,
    tolerance: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    decay: float = 0.98,
    floor: float = 1e-3,
    moving: bool = True,
) -> Whitened:
    """One step; without `moving` the means stay as they are."""
    left, right = fourth_root(d.p, d.steps, decay, floor), fourth_root(d.q, d.steps, decay, floor)
    inv_left, inv_right = torch.linalg.inv(left), torch.linalg.inv(right)

    def spaces(x: Tensor) -> tuple[Tensor, Tensor]:
        """Bases u of X's column space and v of its row space, orthonormal in the metric: u^T P^(1/2) u = 1."""
        u, _, vt = torch.linalg.svd(left @ x @ right)
        return inv_left @ u[:, :r], inv_right @ vt[:r].mT

    def gradient_part(x: Tensor, z: Tensor) -> Tensor:
        """What a matrix like the gradient says about tangent vectors: <Z, xi> = <Z', xi>, Z' of the tangent's image."""
        u, v = spaces(x)
        return left @ tangent_part(left @ u, right @ v, inv_left @ z @ inv_right) @ right

    m = momentum * d.m + g
    m = gradient_part(d.x, m)
    polar = inv_left @ ortho(inv_left @ m @ inv_right, tolerance) @ inv_right  # of spectral norm 1 in the metric
    u, v = spaces(d.x)
    p_half, q_half = left @ left, right @ right
    # the metric's projection onto the tangent space: xi minus what lies outside both spaces, in their complements
    outside = polar - u @ (u.mT @ p_half @ polar)
    direction = polar - (outside - outside @ q_half @ v @ v.mT)
    moved = (1 - lr * weight_decay) * d.x - lr * direction
    w, s, zt = torch.linalg.svd(left @ moved @ right)
    x = inv_left @ (w[:, :r] * s[:r]) @ zt[:r] @ inv_right  # the best approximation of rank r in the metric
    m = gradient_part(x, m)
    if not moving:
        return d._replace(x=x, m=m)
    rows, columns = (g @ v).square().sum(1), (g.mT @ u).square().sum(1)
    p, q = decay * d.p + (1 - decay) * rows, decay * d.q + (1 - decay) * columns
    return Whitened(x, m, p, q, d.steps + 1)
