"""The leading singular triplets of many matrices at once, each known only through its products with a few vectors.

Nothing is done matrix by matrix: tall blocks are stacked by their shape, whatever is small by its size. On a GPU a QR
or an SVD of each tall block would cost more than the products. So float32 blocks are only ever multiplied: their Gram
matrices, summed in float64, where products of float32 numbers are exact, give bases and triplets. A Gram matrix loses
what is smaller than 1e-8 of the largest, far below the rounding of float32 but not of float64: blocks in float64 take
Householder's QR and LAPACK's SVD.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry.batched_eigh import eigh
from lightning_rlora.geometry.gram import cholesky_root, gram
from lightning_rlora.geometry.stacks import stacked_by_shape

Multiply = Callable[[list[Tensor]], list[Tensor]]
"""Multiplies every matrix of a list with its own block of vectors: one call, one block in and out per matrix."""

_DISTINCT = 0.03
"""Singular value of two joined bases under which a direction of one counts as part of the other. Of 0.3, 0.1, 0.03 and
0.001, 0.03 gave the best triplets from products with the rounding of bfloat16 (4e-3), on a spectrum of 1 / i."""

_NOISE = 1e-14
"""Share of the largest squared singular value under which a Gram matrix of float32 numbers holds nothing but noise."""


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

    The range finder of Halko, Martinsson and Tropp (2011, algorithms 4.4 and 5.1): Q spans (G G^T)^q G Omega, with an
    orthonormalisation between any two products so that small singular values are not lost to rounding, and G is
    replaced by Q Q^T G. The range of the iteration before, whose products are at hand, is joined to it, as in a block
    Krylov method: where singular values decay slowly this gains as much as a power step. Makes 2 (power_steps + 1)
    calls in all, `multiply` and `multiply_transposed` in turn.

    Args:
        multiply: From blocks (n_i, k_i) to G_i times the block, (m_i, k_i).
        multiply_transposed: From blocks (m_i, k_i) to G_i^T times the block, (n_i, k_i).
        shapes: (m_i, n_i) of every matrix.
        rank: How many triplets are wanted, one number for all matrices or one for each.
        oversampling: Columns sketched beyond the rank, for accuracy.
        power_steps: The exponent q; more of them help when singular values decay slowly.
        generator: Source of the sketches, through `generator_on` the device.
        dtype: float32 or float64, of the blocks handed out and of the result; products are cast to it.
        device: Of the blocks handed out and of the result.

    Returns:
        For every matrix all k_i = min(rank_i + oversampling, m_i, n_i) triplets; the caller takes the first rank_i.
        Vectors are orthonormal also where singular values are zero.
    """
    ranks = [rank] * len(shapes) if isinstance(rank, int) else rank
    widths = [min(r + oversampling, m, n) for r, (m, n) in zip(ranks, shapes, strict=True)]
    device = torch.device(device)
    generator = generator_on(device, generator)

    def cast(blocks: list[Tensor]) -> list[Tensor]:
        return [block.to(device=device, dtype=dtype) for block in blocks]

    def orthonormal(blocks: list[Tensor]) -> list[Tensor]:
        return [q for (q,) in stacked_by_shape(lambda block: (orthonormal_basis(block, generator),), cast(blocks))]

    sketches = [
        torch.randn(n, k, generator=generator, dtype=dtype, device=device)
        for (_, n), k in zip(shapes, widths, strict=True)
    ]
    bases = [orthonormal(multiply(sketches))]
    del sketches
    products = [cast(multiply_transposed(bases[0]))]
    for _ in range(power_steps):
        bases = [orthonormal(multiply(orthonormal(products[0]))), bases[0]]
        products = [cast(multiply_transposed(bases[0])), products[0]]
    triplets = _triplets_by_svd if dtype is torch.float64 else _triplets_by_gram
    return triplets(bases, products, widths, generator)


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself if it lives on the device, else a new one there that is seeded from it.

    The CPU draws some 1e8 normal numbers a second: seconds for the sketches of a large model, where the passes take as
    long. So a seed gives the same numbers on all devices of one kind, but others on a GPU than on the CPU.
    """
    if generator.device == torch.empty(0, device=device).device:
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


def orthonormal_basis(w: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span those of w (L, m, k), m >= k, the first j those of the first j.

    Where w has less than full rank, directions are added at random. In float32 by a shifted Cholesky QR (Fukaya and
    others, 2020): it leaves directions above 1e-7 of the largest with the length 1, and those below with anything
    between 0 and 1. Random vectors Z (I - Q^T Q) fill up just what is missing, and two plain Cholesky QRs follow.

    Args:
        w: A batch in float32 or float64.
        generator: Source of the random directions, on the device of w.
    """
    if w.dtype is torch.float64:
        q, r = torch.linalg.qr(w)
        return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    _, m, k = w.shape
    q = w.double()
    q = q @ _inverse_root(q)
    random = torch.randn(m, k, generator=generator, dtype=q.dtype, device=w.device) / m**0.5
    q = q + random @ (torch.eye(k, dtype=q.dtype, device=w.device) - gram(q))
    for _ in range(2):
        q = q @ _inverse_root(q)
    return q.to(w.dtype)


def _inverse_root(w: Tensor) -> Tensor:
    """R^-1 of an upper triangular R with R^T R = w^T w + a little of its diagonal, so that R exists in any case."""
    n = gram(w)
    squares = n.diagonal(dim1=-2, dim2=-1).clamp_min(1e-90)  # float32 numbers have none between 0 and 1e-90
    shift = 10 * w.shape[-1] * torch.finfo(n.dtype).eps
    return cholesky_root(n + (shift * squares).diag_embed())[1]


def _triplets_by_gram(
    bases: list[list[Tensor]], products: list[list[Tensor]], widths: list[int], generator: torch.Generator
) -> list[Svd]:
    """The first k triplets of Q Q^T G for every matrix, Q spanning its bases (m, k); products are G^T times these.

    All that is computed of the tall matrices are the two Gram matrices of what stands side by side. The small algebra
    between comes in one batch for each size, over all shapes.
    """

    def grams(*parts: Tensor) -> tuple[Tensor]:
        return (gram(torch.cat(parts, -1)),)

    def combine(k: Tensor, *parts: Tensor) -> tuple[Tensor]:
        return (orthonormal_basis((torch.cat(parts, -1).double() @ k).to(parts[0]), generator),)

    left = [n for (n,) in stacked_by_shape(grams, *bases)]
    right = [n for (n,) in stacked_by_shape(grams, *products)]
    found = stacked_by_shape(_triplets_of_grams, left, right)
    us = stacked_by_shape(combine, [f[0][:, :k] for f, k in zip(found, widths, strict=True)], *bases)
    vs = stacked_by_shape(combine, [f[2][:, :k] for f, k in zip(found, widths, strict=True)], *products)
    return [_with_sign(Svd(u, s[:k].to(u), v)) for (u,), (_, s, _), (v,), k in zip(us, found, vs, widths, strict=True)]


def _triplets_of_grams(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K_u, s and K_v with u = Q K_u and v = G^T Q K_v, from Q^T Q and Q^T G G^T Q, each (L, d, d).

    Columns for singular values that are nothing but rounding vanish.
    """
    values, vectors = eigh(left)
    kept = values > _DISTINCT**2
    # two bases nearly share some directions, which would divide rounding by their small distance: these are dropped
    one_basis = vectors * torch.where(kept, values, torch.inf).rsqrt().unsqueeze(-2)
    squares, vectors = (x.flip(-1) for x in eigh(one_basis.mT @ right @ one_basis))
    exists = squares > _NOISE * squares[:, :1]
    s = torch.where(exists, squares, 0).sqrt()
    k_u = one_basis @ vectors
    return k_u, s, k_u * torch.where(exists, squares, torch.inf).rsqrt().unsqueeze(-2)


def _triplets_by_svd(
    bases: list[list[Tensor]], products: list[list[Tensor]], widths: list[int], generator: torch.Generator
) -> list[Svd]:
    """The same by SVDs, one matrix after another."""
    results = []
    for i, k in enumerate(widths):
        u, s, zt = torch.linalg.svd(torch.cat([basis[i] for basis in bases], -1), full_matrices=False)
        kept = s > _DISTINCT
        gt_q = (torch.cat([product[i] for product in products], -1) @ zt.mT / s.clamp_min(_DISTINCT))[:, kept]
        v, small = torch.linalg.qr(gt_q)
        p, s, wt = torch.linalg.svd(small)
        results.append(_with_sign(Svd((u[:, kept] @ wt.mT)[:, :k], s[:k], (v @ p)[:, :k])))
    return results


def _with_sign(svd: Svd) -> Svd:
    """The signs of a triplet are free: the largest entry of u is made positive, so that rounding does not choose."""
    signs = svd.u.gather(0, svd.u.abs().argmax(0, keepdim=True)).sign()
    return Svd(svd.u * signs, svd.s, svd.v * signs)
