"""The leading singular triplets of many matrices at once, each known only through its products with a few vectors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Multiply = Callable[[list[Tensor]], list[Tensor]]
"""Multiplies every matrix of a list with its own block of vectors: one call, one block in and out per matrix."""

_DISTINCT = 0.03
"""Singular value of two joined bases under which a direction of one counts as part of the other. Of 0.3, 0.1, 0.03 and
0.001, 0.03 gave the best triplets from products with the rounding of bfloat16 (4e-3), on a spectrum of 1 / i."""


class Svd(NamedTuple):
    """Singular triplets of an m x n matrix, the largest singular value first.

    Attributes:
        u: Orthonormal left singular vectors, (m, k).
        s: Singular values, descending, (k,).
        v: Orthonormal right singular vectors, (n, k).
    """

    u: Tensor
    s: Tensor
    v: Tensor


def randomized_svd(
    multiply: Multiply,
    multiply_transposed: Multiply,
    shapes: Sequence[tuple[int, int]],
    rank: int | Sequence[int],
    *,
    oversampling: int,
    power_steps: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Svd]:
    """Approximate the leading singular triplets of matrices G_i by subspace iteration on Gaussian sketches.

    The range finder of Halko, Martinsson and Tropp (2011, algorithms 4.4 and 5.1): Q spans (G G^T)^q G Omega, with a
    QR between any two products so that small singular values are not lost to rounding, and G is replaced by Q Q^T G.
    The range of the iteration before, whose products are at hand, is joined to it, as in a block Krylov method: where
    singular values decay slowly this gains as much as a power step. Makes 2 (power_steps + 1) calls in all, `multiply`
    and `multiply_transposed` in turn.

    Args:
        multiply: From blocks (n_i, k_i) to G_i times the block, (m_i, k_i).
        multiply_transposed: From blocks (m_i, k_i) to G_i^T times the block, (n_i, k_i).
        shapes: (m_i, n_i) of every matrix.
        rank: How many triplets are wanted, one number for all matrices or one for each.
        oversampling: Columns sketched beyond the rank, for accuracy.
        power_steps: The exponent q; more of them help when singular values decay slowly.
        generator: Source of the sketches; they are drawn on its device, so that they do not depend on `device`.
        dtype: float32 or float64, of the blocks handed out and of the result; products are cast to it.
        device: Of the blocks handed out and of the result.

    Returns:
        For every matrix all k_i = min(rank_i + oversampling, m_i, n_i) triplets; the caller takes the first rank_i.
        Vectors are orthonormal also where singular values are zero.
    """
    ranks = [rank] * len(shapes) if isinstance(rank, int) else rank
    widths = [min(r + oversampling, m, n) for r, (m, n) in zip(ranks, shapes, strict=True)]

    def orthonormal(blocks: list[Tensor]) -> list[Tensor]:
        return [torch.linalg.qr(block.to(device=device, dtype=dtype)).Q for block in blocks]

    sketches = [
        torch.randn(n, k, generator=generator, dtype=dtype, device=generator.device).to(device)
        for (_, n), k in zip(shapes, widths, strict=True)
    ]
    bases = orthonormal(multiply(sketches))
    products = multiply_transposed(bases)
    earlier: tuple[list[Tensor], list[Tensor]] | None = None
    for _ in range(power_steps):
        earlier = bases, products
        bases = orthonormal(multiply(orthonormal(products)))
        products = multiply_transposed(bases)
    results = []
    for i, k in enumerate(widths):
        qs, gt_qs = [bases[i]], [products[i]]
        if earlier is not None:
            qs, gt_qs = [bases[i], earlier[0][i]], [products[i], earlier[1][i]]
        gt_q = torch.cat([product.to(device=device, dtype=dtype) for product in gt_qs], -1)
        results.append(_svd_from_range(*_one_basis(torch.cat(qs, -1), gt_q), k))
    return results


def _one_basis(q: Tensor, gt_q: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the columns of q, itself two bases side by side, and G^T times it, from G^T q.

    Directions that both bases nearly share would divide rounding by their small distance, and are dropped.
    """
    u, s, zt = torch.linalg.svd(q, full_matrices=False)
    kept = s > _DISTINCT
    return u[:, kept], (gt_q @ zt.mT / s.clamp_min(_DISTINCT))[:, kept]


def _svd_from_range(q: Tensor, gt_q: Tensor, k: int) -> Svd:
    """The first k triplets of q (G^T q)^T, with the only SVD taken of a small matrix."""
    v, small = torch.linalg.qr(gt_q)
    p, s, wt = torch.linalg.svd(small)
    u, v = (q @ wt.mT)[:, :k], (v @ p)[:, :k]
    # the signs of a triplet are free: the largest entry of u is made positive, so that rounding does not choose them
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return Svd(u * signs, s[:k], v * signs)
