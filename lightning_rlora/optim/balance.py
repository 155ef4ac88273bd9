"""The balanced gauge under optimizers that do not keep it: how far off the factors are, and how to put them back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.adapters import LoraPair, group_by_shape, matrix, read_points, write_point
from lightning_rlora.geometry import RANK_TOLERANCE, Point

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Names under which torch's optimizers keep running means of the gradient."""


@torch.no_grad()
def imbalance(pairs: list[LoraPair]) -> Tensor:
    """How far each pair of one shape is from the balanced gauge, (L,): 0 where B^T B = A A^T is diagonal.

    The largest entry of B^T B - A A^T and of both matrices' off-diagonal parts, relative to the columns' norms.
    """
    b = torch.stack([matrix(pair.b) for pair in pairs]).double()
    a = torch.stack([matrix(pair.a) for pair in pairs]).double()
    n_b, n_a = b.mT @ b, a @ a.mT
    sizes = (n_b + n_a).diagonal(dim1=-2, dim2=-1).div(2).sqrt()
    scale = sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
    off_b, off_a = (n - torch.diag_embed(n.diagonal(dim1=-2, dim2=-1)) for n in (n_b, n_a))
    return torch.stack([(n / scale).abs().amax((1, 2)) for n in (n_b - n_a, off_b, off_a)]).amax(0)


@torch.no_grad()
def balance(pairs: list[LoraPair], state: Mapping[Tensor, Any]) -> int:
    """Put pairs into the balanced gauge without changing their products, and carry the optimizer's first moments along.

    Factors become A' = S A and B' = B S^-1, so a mean of gradients with respect to A becomes S^-T times itself and one
    with respect to B itself times S^T. Second moments, kept entry by entry, have no such rule and stay as they are; so
    do pairs whose product is not of full rank (a factor of zeros), which have no balanced point.

    Args:
        pairs: The pairs.
        state: The optimizer's state, by parameter.

    Returns:
        The number of pairs left as they were.
    """
    skipped = 0
    for batch in group_by_shape(pairs):
        points = read_points(batch)
        for i, pair in enumerate(batch):
            point = Point(points.u[i], points.s[i], points.v[i])
            if not bool(point.s[-1] > RANK_TOLERANCE.get(pair.a.dtype, 1e-3) * point.s[0]):
                skipped += 1
                continue
            old_a = matrix(pair.a).double()
            root = (point.s / pair.scaling).sqrt()
            # A' = sqrt(s / c) V^T = S A with S = A' A^+, and S^-1 = A A'^+, where A'^+ = V / sqrt(s / c)
            inverse = old_a @ point.v / root
            gauge = torch.linalg.inv(inverse)
            write_point(pair, point)
            for name in FIRST_MOMENTS:
                _transform(state.get(pair.b, {}).get(name), lambda moment, s=gauge: moment @ s.mT)
                _transform(state.get(pair.a, {}).get(name), lambda moment, s=inverse: s.mT @ moment)
    return skipped


def _transform(moment: Tensor | None, rule: Any) -> None:
    """Apply a rule on matrices to a moment of any factor's shape, in place."""
    if isinstance(moment, Tensor):
        moment.copy_(rule(moment.flatten(1).double()).reshape(moment.shape))
