"""Polar factors and leading singular triplets of many matrices too large for `small_matrices`, by matrix products.

Products are what a GPU is quickest at, and they never wait for the host. What products alone cannot do, they detect;
those matrices, and only those, go through one-sided Jacobi, which always works and is slow.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rlora.geometry import gram
from lightning_rlora.optim.cuda import exact_kernels, product_kernels, small_kernels
from lightning_rlora.optim.cuda.small_matrices import TINY, nudged

_CUSHION = 0.02
"""Singular values above this share of the largest are never made smaller than it, or rounding would grow with them."""
_POLAR_DEFECT = 1e-11
"""Of tr G - |G|^2, G = X^T X: no singular value of X is farther than 3e-6 from both 0 and 1."""
_MODERATE = 0.01
"""Most momenta have no singular values below this share of the largest; they are done in half the products."""
_PURE = 1e-11
_STEPS = 100
_NEARLY_DIAGONAL = 3e-4
"""Couplings below this share of the smallest singular value vanish to 1e-11 in three half steps of iteration."""
_RESIDUAL = 1e-10
_COSINE = 1e-5
_SMALL = 1e-4


# ------------------------------------------------------------------------------------------------------- polar factor


Quintic = tuple[float, float, float]
"""a, b, c of the odd polynomial a x + b x^3 + c x^5."""

_TO_ONE: Quintic = (15 / 8, -10 / 8, 3 / 8)  # slope and curvature zero at 1
_TO_ZERO_OR_ONE: Quintic = (0.0, 2.5, -1.5)  # slope zero at 1 and at 0


def polar_coefficients(smallest: float) -> list[Quintic]:
    """Quintics that, one after the other, take [smallest, 1] to 1 and what is far below to 0."""
    return [*_nearest_to_one(smallest), _TO_ZERO_OR_ONE, _TO_ZERO_OR_ONE]


def first_coefficients() -> list[Quintic]:
    """Fewer quintics for values in [`_MODERATE`, 1]; smaller ones end between 0 and 1, where they can be seen."""
    return [*_nearest_to_one(_MODERATE), _TO_ONE, _TO_ONE]


@cache
def _nearest_to_one(smallest: float) -> list[Quintic]:
    """Quintics that are each the nearest to 1 on the interval where those before leave the values.

    The difference then has four extremes of equal size and alternating sign (Remez), at both ends and at two points
    between.
    """
    low, high = smallest, 1.0
    found: list[Quintic] = []
    while high - low > 3e-4:
        left = max(low, _CUSHION * high)
        points = np.array([left, (3 * left + high) / 4, (left + 3 * high) / 4, high])
        for _ in range(50):
            system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
            a, b, c, _ = np.linalg.solve(system, np.ones(4)).tolist()
            root = (9 * b * b - 20 * a * c) ** 0.5
            points[1:3] = ((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5
        found.append((a, b, c))
        x = np.append(np.geomspace(low, high, 20000), points)
        y = x * (a + x * x * (b + x * x * c))
        low, high = y.min().item(), y.max().item()
    return found


def polar_factor(k: Tensor, tolerance: float) -> Tensor:
    """`lightning_rlora.geometry.gram.polar_factor`, except that values down to tolerance / n^(1/8) may count, too.

    Args:
        k: float64 (L, n, n).
        tolerance: Singular values above this share of the largest become 1, the others 0.
    """
    n = k.shape[-1]
    x = k / k.norm(dim=(1, 2), keepdim=True).clamp_min(TINY)
    g = x.mT @ x
    # the largest singular value is at most the fourth root of |G^2|, and at least n^(-1/8) of it
    x = x * (g @ g).norm(dim=(1, 2), keepdim=True).clamp_min(TINY).pow(-0.25)
    if _by_kernels(k):
        coefficients, few = _coefficients_on(k.device, tolerance / n**0.125)
        x, defect = product_kernels.odd_polynomials(_padded(x), coefficients, few, _POLAR_DEFECT)
        x = x[:, :n, :n]
    else:
        for a, b, c in polar_coefficients(tolerance / n**0.125):
            g = x.mT @ x
            x = torch.baddbmm(x, x, torch.baddbmm(g, g, g, beta=b, alpha=c), beta=a)
        g = x.mT @ x
        defect = g.diagonal(dim1=1, dim2=2).sum(1) - g.norm(dim=(1, 2)).square()
    # values that are neither 1 nor 0 by now lie at or below the tolerance
    return _polar_where(~(defect <= _POLAR_DEFECT), k, tolerance, x)


@cache
def _coefficients_on(device: torch.device, smallest: float) -> tuple[Tensor, int]:
    """The first coefficients, then those for all matrices; and the number of the first."""
    few = first_coefficients()
    return torch.tensor([*few, *polar_coefficients(smallest)], dtype=torch.float64, device=device), len(few)


def _polar_where(needed: Tensor, k: Tensor, tolerance: float, x: Tensor) -> Tensor:
    if not _by_kernels(k):
        return x.index_copy(0, needed.nonzero().squeeze(1), gram.polar_factor(k[needed], tolerance))
    padded, out = _padded(k), _padded(x)
    scratch = padded.new_empty(len(k), 2, *padded.shape[1:])
    exact_kernels.exact_polar(padded, scratch, out, needed.int(), tolerance)
    return out[:, : k.shape[1], : k.shape[1]]


# --------------------------------------------------------------------------------------------------- leading triplets


def leading_triplets(matrices: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`lightning_rlora.optim.two_pass.Triplets` by products: first the space of the r values, then what is in it.

    Args:
        matrices: C, float64 (L, n, n).
        r: n / 2.
    """
    right, pure = leading_space(matrices, r)
    left = _orthonormal(matrices @ right)
    right = _orthonormal(matrices.mT @ left)
    q = right @ _diagonalising(left.mT @ (matrices @ right))
    p = matrices @ q
    size = p.square().sum(1)
    order = size.argsort(dim=1, descending=True)
    sigma = size.gather(1, order).sqrt()
    p, q = (x.gather(2, order.unsqueeze(1).expand_as(x)) for x in (p, q))
    p = p / sigma.clamp_min(TINY).unsqueeze(1)
    # p diag(sigma) q^T is exact even if columns are not quite orthogonal; small ones are made so, which changes little
    p = torch.where((sigma < _SMALL * sigma[:, :1]).unsqueeze(1), _polished(_polished(p)), p)
    # within the space any orthogonal columns will do, so close values need not be told apart
    image = matrices.mT @ p
    outside = (image - q @ (q.mT @ image)).norm(dim=(1, 2))
    cosine = (p.mT @ p - torch.eye(r, dtype=p.dtype, device=p.device)).abs().amax((1, 2))
    good = pure & (outside <= _RESIDUAL * sigma[:, 0]) & (cosine <= _COSINE) & (sigma[:, -1] > 0)
    return _triplets_where(~good, matrices, r, p, sigma, q)


def leading_space(matrices: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A basis (L, n, r) of the r leading right singular vectors' span, and for which matrices it is one."""
    n = matrices.shape[-1]
    beside = matrices.clone()
    diagonal = beside.diagonal(dim1=1, dim2=2)[:, :r]
    smallest = diagonal.abs().amin(1)
    diagonal.zero_()
    diagonal_already = beside.norm(dim=(1, 2)) <= _NEARLY_DIAGONAL * smallest
    x, pure = _purified(matrices.mT @ matrices, r, diagonal_already)
    start = _start(n, r, matrices.device)
    y = torch.where(diagonal_already[:, None, None], start, x @ start)
    return y @ _inverse_root(y.mT @ y), pure | diagonal_already


@cache
def _start(n: int, r: int, device: torch.device) -> Tensor:
    """The first r unit vectors, so that what is nearly diagonal stays so, and a little of all others."""
    noise = torch.randn(n, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (torch.eye(n, r, dtype=torch.float64) + 0.3 * r**-0.5 * noise).to(device)


def _purified(x: Tensor, r: int, skip: Tensor) -> tuple[Tensor, Tensor]:
    """The projectors onto the r leading eigenvectors of semidefinite x (L, n, n), and which of them succeeded.

    With eigenvalues in [0, 1], X <- X^2 or 2 X - X^2, whichever brings the trace nearer to r: both keep the order of
    the eigenvalues, and together they drive them to 0 and 1 (trace-correcting purification).
    """
    norm = x.norm(dim=(1, 2))
    bound = torch.minimum(x.norm(p=1, dim=1).amax(1), norm).clamp_min(TINY)
    trace, square = x.diagonal(dim1=1, dim2=2).sum(1) / bound, (norm / bound).square()
    if _by_kernels(x):
        n, size = x.shape[-1], _padded_size(x.shape[-1])
        buffers = x.new_empty(len(x), 2, size, size)
        if size > n:
            buffers[:, 0].zero_()
        torch.div(x, bound[:, None, None], out=buffers[:, 0, :n, :n])
        product_kernels.purify(buffers, trace, square, skip.int(), r, _STEPS, _PURE / 10)
        x = buffers[:, 0, :n, :n]
    else:
        x = x / bound[:, None, None]
        for _ in range(_STEPS):
            active = (trace - square > _PURE / 10) & ~skip
            if not bool(active.any()):
                break
            widen = (square - r).abs() > (2 * trace - square - r).abs()
            moved = torch.where(widen[:, None, None], 2 * x - x @ x, x @ x)
            x = torch.where(active[:, None, None], moved, x)
            trace, square = x.diagonal(dim1=1, dim2=2).sum(1), x.square().sum((1, 2))
    return x, (trace - square <= _PURE) & ((trace - r).abs() < 0.1)


def _diagonalising(core: Tensor) -> Tensor:
    """Right singular vectors of core (L, r, r), in no order: in float32 first, then what is left in float64."""
    u = _left_vectors((core / core.norm(dim=(1, 2), keepdim=True).clamp_min(TINY)).float(), 1e-4).double()
    for _ in range(2):  # orthogonal to 1e-6, then to rounding
        u = _polished(u)
    return _polished(_left_vectors(core.mT @ u, 1e-6))


def _left_vectors(x: Tensor, cosine: float) -> Tensor:
    """Left singular vectors of x (L, r, r), in no order."""
    if not _by_kernels(x):
        return torch.linalg.svd(x.nan_to_num())[0]  # what is not finite by now goes the exact way
    columns = small_kernels.orthogonal_columns(x, cosine)
    size = columns.norm(dim=1, keepdim=True)
    return columns / size


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of the span of the columns: by the Cholesky root of their Gram matrix, then polished."""
    return _polished(y @ _inverse_root(y.mT @ y))


def _polished(y: Tensor) -> Tensor:
    """Nearly orthonormal columns made so to the square of what is missing (Newton and Schulz)."""
    return torch.baddbmm(y, y, y.mT @ y, beta=1.5, alpha=-0.5)


def _inverse_root(n: Tensor) -> Tensor:
    """T with T^T N T = 1, upper triangular."""
    return (small_kernels.cholesky if _by_kernels(n) else gram.cholesky_root)(n)[1]


def _triplets_where(
    needed: Tensor, matrices: Tensor, r: int, p: Tensor, sigma: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    matrices = nudged(matrices)
    if not _by_kernels(matrices):
        where = needed.nonzero().squeeze(1)
        u, s, vt = torch.linalg.svd(matrices[where])
        exact = u[..., :r], s[..., :r], vt.mT[..., :r]
        p, sigma, q = (x.index_copy(0, where, y) for x, y in zip((p, sigma, q), exact, strict=True))
        return p, sigma, q
    padded, p, sigma, q = _padded(matrices), p.contiguous(), sigma.contiguous(), q.contiguous()
    scratch = padded.new_empty(len(padded), 2, *padded.shape[1:])
    exact_kernels.exact_triplets(padded, scratch, p, sigma, q, needed.int())
    return p, sigma, q


# ------------------------------------------------------------------------------------------------------------- routes


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _padded_size(n: int) -> int:
    """A size that the kernels take: a power of two up to their tile, a multiple of it above."""
    if n <= product_kernels.TILE:
        return max(16, 1 << (n - 1).bit_length())
    return -(-n // product_kernels.TILE) * product_kernels.TILE


def _padded(x: Tensor) -> Tensor:
    missing = _padded_size(x.shape[-1]) - x.shape[-1]
    return nn.functional.pad(x, (0, missing, 0, missing)) if missing else x.contiguous()
