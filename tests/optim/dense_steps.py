"""The optimizers' oracle: the same iteration with materialised m x n matrices in float64, one line an operation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry import RANK_TOLERANCE


class Dense(NamedTuple):
    """X and M as m x n matrices, with orthonormal bases of X's column and row space."""

    x: Tensor
    m: Tensor
    u: Tensor
    v: Tensor


def tangent_part(u: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """P_X(Z): Z without what lies outside both the column and the row space."""
    beside = z - u @ (u.mT @ z)
    return z - (beside - beside @ v @ v.mT)


def bases(x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u[:, :r], vt[:r].mT


def dense_start(x: Tensor, r: int) -> Dense:
    return Dense(x, torch.zeros_like(x), *bases(x, r))


def ortho(m: Tensor, tolerance: float) -> Tensor:
    p, s, qt = torch.linalg.svd(m, full_matrices=False)
    return (p * (s > tolerance * s[0])) @ qt


def riemannion_direction(dtype: torch.dtype) -> Callable[[Dense], Tensor]:
    return lambda d: tangent_part(d.u, d.v, ortho(d.m, RANK_TOLERANCE[dtype]))


def sgd_direction(d: Dense) -> Tensor:
    return d.m


def dense_step(
    d: Dense,
    g: Tensor,
    direction: Callable[[Dense], Tensor],
    *,
    lr: float,
    momentum: float,
    gradient_weight: float,
    weight_decay: float,
) -> Dense:
    """Momentum, direction, best rank-r approximation, projection of the momentum (before the direction) there."""
    r = d.u.shape[1]
    d = d._replace(m=momentum * d.m + gradient_weight * tangent_part(d.u, d.v, g))
    moved = (1 - lr * weight_decay) * d.x - lr * direction(d)
    p, s, qt = torch.linalg.svd(moved, full_matrices=False)
    u, v = p[:, :r], qt[:r].mT
    return Dense((u * s[:r]) @ v.mT, tangent_part(u, v, d.m), u, v)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
