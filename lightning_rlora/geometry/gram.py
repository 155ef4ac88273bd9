"""The small linear algebra of the fast step: orthonormal bases from Gram matrices, without touching a tall matrix.

A tall W (m, k) never needs a QR here. Its Gram matrix N = W^T W gives R with R^T R = N, and W R^-1 has orthonormal
columns. Everything is batched and in float64: products of two float32 numbers are exact there, so the differences that
a projection takes do not drown in rounding. Of float64 factors they would; a QR gives the same things for them.
"""

import torch
from torch import Tensor, nn


def gram(w: Tensor) -> Tensor:
    """W^T W of each matrix, (..., m, k) -> (..., k, k), summed in float64."""
    w = w.double()
    return w.mT @ w


def cholesky_root(n: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R with R^T R = N, and R^-1, of positive definite N (..., k, k) in float64.

    N is scaled to unit diagonal first, so columns whose norms spread over many orders of magnitude lose nothing.
    """
    scale = n.diagonal(dim1=-2, dim2=-1).rsqrt()
    upper = torch.linalg.cholesky_ex(n * scale.unsqueeze(-1) * scale.unsqueeze(-2))[0].mT
    return upper / scale.unsqueeze(-2), scale.unsqueeze(-1) * _triangular_inverse(upper)


def range_root(n: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = N and T with T^T N T = 1 on the range of N (..., k, k), positive semidefinite, float64.

    Eigenvalues at or below floor (...) count as zero: their columns of T and rows of R vanish, so W T has orthonormal
    columns for the directions that exist and zero columns for those that do not.
    """
    upper, failed = torch.linalg.cholesky_ex(n)
    upper = upper.mT
    if not bool(failed.any()) and bool((upper.diagonal(dim1=-2, dim2=-1).square() > floor.unsqueeze(-1)).all()):
        return upper, _triangular_inverse(upper)  # the usual case, many times as quick
    values, vectors = torch.linalg.eigh(n)
    kept = values > floor.unsqueeze(-1)
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, values, 1).rsqrt() * kept
    return root.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2)


def root_of_range(w: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """`range_root` of w^T w from w (..., p, k) itself, for which w^T w would be too coarse."""
    _, s, vectors = torch.linalg.svd(w, full_matrices=False)
    kept = s.square() > floor.unsqueeze(-1)
    root = torch.where(kept, s, 0).unsqueeze(-1) * vectors
    inverse = vectors.mT * (torch.where(kept, s, 1).reciprocal() * kept).unsqueeze(-2)
    missing = w.shape[-1] - s.shape[-1]  # w has fewer rows than columns
    return nn.functional.pad(root, (0, 0, 0, missing)), nn.functional.pad(inverse, (0, missing))


def triangle(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The QR of [W Z] for a first block W (..., m, r) of full rank, without its Q.

    Args:
        w: The blocks side by side, (..., m, r + k).
        r: Columns of the first block.

    Returns:
        R with R^T R = W^T W and a positive diagonal; R^-1; (W R^-1)^T Z; and a matrix K with K^T K the Gram matrix of
        what Z has outside W's range.
    """
    full = torch.linalg.qr(w, mode="r").R
    sign = full.diagonal(dim1=-2, dim2=-1)[..., :r].sign().unsqueeze(-1)
    top, below = full[..., :r, :] * sign, full[..., r:, r:]
    root = top[..., :r]
    return root, _triangular_inverse(root), top[..., r:], below


def _triangular_inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)


def polar_factor(k: Tensor, tolerance: float) -> Tensor:
    """The polar factor of k (..., p, q): singular values above tolerance times the largest become 1, the others 0."""
    u, s, vt = torch.linalg.svd(k, full_matrices=False)
    kept = (s > tolerance * s[..., :1]).to(k.dtype)
    return (u * kept.unsqueeze(-2)) @ vt


def polar_factor_by_eigh(k: Tensor, tolerance: float) -> Tensor:
    """`polar_factor` from the eigenvalues of k^T k, in half the time, for tolerances well above 1e-8."""
    values, vectors = torch.linalg.eigh(k.mT @ k)
    kept = values > tolerance**2 * values[..., -1:]
    inverse = torch.where(kept, values, 1).rsqrt() * kept
    return k @ (vectors * inverse.unsqueeze(-2)) @ vectors.mT
