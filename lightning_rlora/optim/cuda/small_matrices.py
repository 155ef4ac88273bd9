"""Polar factors and leading singular triplets of many small matrices at once, by rotations in registers.

For matrices up to 64 x 64; `products` has the same functions for larger ones. Neither waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlora.optim.cuda.small_kernels import orthogonal_columns

TINY = 1e-300


def polar_factor(k: Tensor, tolerance: float) -> Tensor:
    """`lightning_rlora.geometry.gram.polar_factor` by one-sided Jacobi rotations.

    K W has orthogonal columns u_i s_i; with w_i = K^T u_i / s_i the factor is the sum of u_i w_i^T over s_i above the
    tolerance times the largest.
    """
    turned = orthogonal_columns(k)
    square = turned.square().sum(1, keepdim=True)
    kept = square > tolerance**2 * square.amax(2, keepdim=True)
    u = turned * torch.where(kept, square.clamp_min(TINY).rsqrt(), 0)
    return u @ (torch.where(kept, square.clamp_min(TINY).rsqrt(), 0) * u).mT @ k


def leading_triplets(matrices: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`lightning_rlora.optim.two_pass.Triplets` by one-sided Jacobi rotations."""
    matrices = nudged(matrices)
    turned = orthogonal_columns(matrices)
    sigma, order = turned.norm(dim=1).topk(r, dim=1)
    p = turned.gather(2, order.unsqueeze(1).expand(-1, turned.shape[1], -1)) / sigma.clamp_min(TINY).unsqueeze(1)
    q = matrices.mT @ p
    return p, sigma, q / q.norm(dim=1, keepdim=True)


def nudged(matrices: Tensor) -> Tensor:
    """Plus a multiple of the identity, far below rounding, that gives a direction to columns that vanish."""
    return matrices + torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device) * 1e-20
