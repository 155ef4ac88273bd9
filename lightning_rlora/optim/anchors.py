"""Anchors: small sketches of the orthonormal bases that a momentum refers to.

The momentum's tangent factors are coefficients on the bases U and V of the point; a whitened momentum is kept as its
products with the factors themselves. Where factors are changed from outside between two steps (loaded, merged,
re-factored), their sketch does not agree with the anchor any more, and tells how the bases turned.
"""

import torch
from torch import Tensor

MOVED = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative change of the anchors that means a change from outside; rounding moves them by 1e-6 and 1e-15."""

_SUMMED, _SUMMED_OF_EMBEDDINGS, _EMBEDDING = 4, 64, 2**14
"""About how many rows of a factor one row of its sketch sums; and of one of more rows than the last number."""


def sketch_rows(rank: int) -> int:
    """Rows of a sketch: enough to tell two bases apart, and few beside a factor's."""
    return rank + 8


def sketch_stride(height: int, rank: int) -> int:
    """Distance of the rows that are read of a tall matrix."""
    summed = _SUMMED if height <= _EMBEDDING else _SUMMED_OF_EMBEDDINGS
    return max(1, height // (summed * sketch_rows(rank)))


def sketch(*stacks: Tensor) -> Tensor:
    """Sums of evenly spaced rows of tall matrices, in stacks (l, rows, r) of any heights: (L, k, r).

    Single rows would not do: an embedding's start from gradients is zero in the rows of all tokens not seen. Of a very
    large vocabulary of which hardly anything is seen, the sketch may still miss it all; a change is then not noticed.
    """
    r = stacks[0].shape[-1]
    k = sketch_rows(r)
    reads = [stack[:, :: sketch_stride(stack.shape[1], r)] for stack in stacks]
    summed = max(-(-read.shape[1] // k) for read in reads)
    rows = stacks[0].new_zeros(sum(len(read) for read in reads), summed * k, r)
    for read, place in zip(reads, rows.split([len(read) for read in reads]), strict=True):
        place[:, : read.shape[1]] = read
    return rows.unflatten(1, (-1, k)).sum(1)


def stands(sketched: Tensor, anchors: Tensor, tolerance: float) -> Tensor:
    """Whether sketches (L, k, r) of the bases agree with their anchors, (L,)."""
    return (sketched - anchors).flatten(1).norm(dim=1) <= tolerance * anchors.flatten(1).norm(dim=1)


def turn(sketched: Tensor, anchors: Tensor, tolerance: float) -> Tensor:
    """The old bases in the new ones, U^T U_old (L, r, r), from sketches of both.

    Identity where a basis did not move, zero where it does not span the old space any more.
    """
    eye = torch.eye(sketched.shape[-1], dtype=sketched.dtype, device=sketched.device)
    turned = torch.linalg.pinv(sketched) @ anchors
    residual = (sketched @ turned - anchors).flatten(1).norm(dim=1)
    same_span = residual <= 1e-2 * anchors.flatten(1).norm(dim=1)
    rotation = (turned.mT @ turned - eye).flatten(1).norm(dim=1) <= 1e-2
    turned = torch.where((same_span & rotation)[:, None, None], turned, 0)
    return torch.where(stands(sketched, anchors, tolerance)[:, None, None], eye, turned)


def same_columns(sketched: Tensor, anchors: Tensor, tolerance: float) -> Tensor:
    """Whether sketches (L, k, r) of the factors agree with their anchors, column by column, (L,)."""
    sizes = anchors.norm(dim=1).clamp_min(torch.finfo(anchors.dtype).tiny)
    return ((sketched - anchors).norm(dim=1) <= tolerance * sizes).all(1)


def refactoring(sketched: Tensor, anchors: Tensor, tolerance: float) -> Tensor:
    """S (L, r, r) of factors F_old S = F, from sketches (L, k, r) of both that keep the sizes of columns.

    Identity where a factor did not change, zero where it does not span the old space any more.
    """
    sizes = anchors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(anchors.dtype).tiny)
    old = anchors / sizes
    eye = torch.eye(sketched.shape[-1], dtype=sketched.dtype, device=sketched.device)
    unchanged = same_columns(sketched, anchors, tolerance)
    if bool(unchanged.all()):
        return eye.expand(len(old), -1, -1)
    found = torch.linalg.pinv(old, rtol=tolerance) @ sketched
    lengths = sketched.norm(dim=1)
    same_span = ((old @ found - sketched).norm(dim=1) <= 1e-2 * lengths).all(1) & (lengths > 0).all(1)
    known = torch.linalg.matrix_rank(old, rtol=tolerance) == sketched.shape[-1]
    found = torch.where((same_span & known)[:, None, None], found / sizes.mT, 0)
    return torch.where(unchanged[:, None, None], eye, found)
