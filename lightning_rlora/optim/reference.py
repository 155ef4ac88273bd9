"""The step of Riemannion and RiemannianSGD as the papers write it: the oracle of the two-pass step.

One matrix or a batch of one shape, by QRs and SVDs, one line an operation. Slow, and meant to be read.
"""

from collections.abc import Callable

from torch import Tensor

from lightning_rlora.geometry import Point, Tangent, orthogonalize, project, retract, transport


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
