"""Diagonal curvatures of both sides of a product, and the frame in which their metric is the plain one.

With curvatures C (m) and D (n), positive diagonal matrices that hold the root mean squares of the loss gradient's rows
and columns, the whitened metric on m x n matrices is

    <xi, eta>_CD = tr(C xi D eta^T) = <xi~, eta~>,      xi~ = C^(1/2) xi D^(1/2)

and the map X -> X~ = C^(1/2) X D^(1/2) to the frame of the wavy letters takes this metric to the plain one. It keeps
ranks, so fixed-rank manifolds, their tangent spaces, projections and best approximations of either metric go onto one
another: a step in the metric is the plain step in the frame. A gradient is a linear function of xi, and <G, xi> =
<G~, xi~> for G~ = C^(-1/2) G D^(-1/2). Of the factors, X~ = c (C^(1/2) B) (A D^(1/2)), with autograd's gradients
C^(-1/2) (c G A^T) and (c B^T G) D^(-1/2): rows of tall matrices are scaled, and that is all.

Momentum is a linear function, too, known on the tangent space at X alone, where it is all in the products c M A^T and
c B^T M. It is stored as these, the form of the factors' gradients: they need no metric, so that where C and D move
between two steps they are whitened anew like the gradient's, exactly; and (A, B) -> (S A, B S^-1) acts on them as on
gradients. The metric enters once a step: M is carried from X to X' as the m x n matrix C^(1/2) M~ D^(1/2), where M~ is
the tangent vector at X~ of the frame in which the step was made.

The curvatures of step t are made of the gradients before it (so the first step is plain), each seen in the frame of
its own step: c_i^2 is the mean of |row i of G D^(-1/2) V~|^2, V~ being an orthonormal basis of X~'s row space, and
d_j^2 likewise of G^T C^(-1/2) U~. Row norms are the same for every orthonormal basis, so the curvatures do not depend
on how X is factored. A step is made in one frame, and one Gram matrix a side serves it and its curvatures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def row_weights(curvature: Tensor, floor: float) -> Tensor:
    """C^(1/2), by which a tall matrix is brought into the frame.

    Means of the past t steps that start at zero are too small by 1 - decay^t, the same in every row: scaling to mean 1
    corrects it, and takes the gradient's scale out as well.

    Args:
        curvature: Root mean squares of rows, (..., rows), zero where nothing is known.
        floor: Added to the squares, as a share of their mean.

    Returns:
        The weights, with mean 1; ones where all rows are zero.
    """
    tiny = torch.finfo(curvature.dtype).tiny
    squares = (curvature / curvature.amax(-1, keepdim=True).clamp_min(tiny)).square()
    weights = (squares / squares.mean(-1, keepdim=True).clamp_min(tiny) + floor).sqrt().sqrt()
    return weights / weights.mean(-1, keepdim=True)


def row_squares(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Squared norms of rows of each tall matrix, (..., rows, r) -> (..., rows), in float64."""
    found = [tall.square().sum(-1).double() for tall in stacks]
    means = torch.cat([squares.mean(-1, keepdim=True).flatten() for squares in found])
    if not bool(((means > 1e-20) & (means < 1e30)).all()):  # perhaps squares that float32 does not hold
        return [tall.double().square().sum(-1) for tall in stacks]
    return found


def with_rows(curvature: Tensor, squares: Tensor, decay: float) -> Tensor:
    """The curvature with one more gradient in its means.

    Args:
        curvature: Root mean squares so far, (..., rows).
        squares: Squared norms of the gradient's rows, of the same shape, in float64.
        decay: Share of the old means that is kept.

    Returns:
        The new root mean squares, in float64: roots, since squares of small gradients vanish in float32.
    """
    return torch.lerp(squares, curvature.double().square(), decay).sqrt()
