"""The step of Riemannion and RiemannianSGD as the papers write it, and the whitened one: oracles of the fast steps.

One matrix or a batch of one shape, by QRs and SVDs, one line an operation. Slow, and meant to be read.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rlora.geometry import (
    Point,
    Tangent,
    orthogonalize,
    point_to_dense,
    project,
    retract,
    tangent_to_dense,
    transport,
)
from lightning_rlora.optim.whitening import row_squares, row_weights, with_rows


def reference_step(
    point: Point,
    velocity: Tangent,
    gradient_v: Tensor,
    gradient_u: Tensor,
    *,
    lr: float,
    momentum: float = 0.9,
    gradient_weight: float = 1.0,
    weight_decay: float = 0.0,
    direction: Callable[[Point, Tangent], Tangent] = orthogonalize,
) -> tuple[Point, Tangent]:
    """One step from a point and the momentum at it (Eq. 10 to 12 of arXiv 2507.12142).

    The printed Algorithm 4 differs in two lines that we do not follow: it stores the orthogonalised direction as
    momentum, and it leaves the current point out of the retraction.

    Args:
        point: X = U diag(s) V^T.
        velocity: The momentum M, a tangent vector at the point.
        gradient_v: G V (..., m, r) for the loss gradient G with respect to X.
        gradient_u: G^T U (..., n, r).
        lr: Length of the step.
        momentum: Share of the old momentum that is kept.
        gradient_weight: Weight of the new gradient; Riemannion adds it whole, RiemannianSGD takes 1 - momentum.
        weight_decay: Rate at which X shrinks towards zero, times lr.
        direction: What to step along; `orthogonalize` for Riemannion, the momentum itself for RiemannianSGD.

    Returns:
        The new point, and the momentum there.
    """
    gradient = project(point, gradient_v, gradient_u)
    velocity = Tangent(
        momentum * velocity.a + gradient_weight * gradient.a, momentum * velocity.b + gradient_weight * gradient.b
    )
    step = direction(point, velocity)
    shrunk = point._replace(s=(1 - lr * weight_decay) * point.s)
    new_point = retract(shrunk, Tangent(-lr * step.a, -lr * step.b))
    return new_point, transport(point, velocity, new_point)


def whitened_reference_step(
    x: Tensor,
    momentum_matrix: Tensor,
    curvatures: tuple[Tensor, Tensor],
    gradient: Tensor,
    rank: int,
    *,
    lr: float,
    momentum: float = 0.8,
    weight_decay: float = 0.0,
    decay: float = 0.98,
    floor: float = 1e-3,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """One step of `WhitenedRiemannion` on m x n matrices: `reference_step` in the frame of `whitening`.

    Args:
        x: X, (m, n).
        momentum_matrix: The momentum M, a matrix like the gradient, zeros at first.
        curvatures: Root mean squares (m,) and (n,) of the gradient's rows and columns, zeros at first.
        gradient: The loss gradient G, (m, n).
        rank: The rank r of X.
        lr: Length of the step.
        momentum: Share of the old momentum that is kept.
        weight_decay: Rate at which X shrinks towards zero, times lr.
        decay: Share of the curvatures' squares that is kept.
        floor: Added to the squares, as a share of their mean.

    Returns:
        The new X, M and curvatures.
    """
    left, right = row_weights(curvatures[0], floor).unsqueeze(1), row_weights(curvatures[1], floor)
    u, s, vt = torch.linalg.svd(left * x * right, full_matrices=False)
    point = Point(u[:, :rank], s[:rank], vt[:rank].mT)
    g, m = gradient / (left * right), momentum_matrix / (left * right)
    g_v, g_u = g @ point.v, g.mT @ point.u
    velocity = project(point, m @ point.v, m.mT @ point.u)
    point, velocity = reference_step(point, velocity, g_v, g_u, lr=lr, momentum=momentum, weight_decay=weight_decay)
    rows, columns = row_squares([left * g_v, right.unsqueeze(1) * g_u])
    return (
        point_to_dense(point) / (left * right),
        tangent_to_dense(point, velocity) * (left * right),
        (with_rows(curvatures[0], rows, decay), with_rows(curvatures[1], columns, decay)),
    )
