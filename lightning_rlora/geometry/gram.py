"""The small linear algebra of the fast step: orthonormal bases from Gram matrices, without touching a tall matrix.

A tall W (m, k) never needs a QR here. Its Gram matrix N = W^T W gives R with R^T R = N, and W R^-1 has orthonormal
columns. Everything is batched and in float64: products of two float32 numbers are exact there, so the differences that
a projection takes do not drown in rounding.
"""

import torch
from torch import Tensor


def gram(w: Tensor) -> Tensor:
    """W^T W of each matrix, (..., m, k) -> (..., k, k), summed in float64."""
    w = w.double()
    return w.mT @ w


def cholesky_root(n: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R with R^T R = N, and R^-1, of positive definite N (..., k, k) in float64.

    N is scaled to unit diagonal first, so columns whose norms spread over many orders of magnitude lose nothing.
    """
    scale = n.diagonal(dim1=-2, dim2=-1).rsqrt()
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    upper = torch.linalg.cholesky_ex(n * scale.unsqueeze(-1) * scale.unsqueeze(-2))[0].mT
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    return upper / scale.unsqueeze(-2), scale.unsqueeze(-1) * inverse


def range_root(n: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = N and T with T^T N T = 1 on the range of N (..., k, k), positive semidefinite, float64.

    Eigenvalues at or below floor (...) count as zero: their columns of T and rows of R vanish, so W T has orthonormal
    columns for the directions that exist and zero columns for those that do not.
    """
    values, vectors = torch.linalg.eigh(n)
    kept = values > floor.unsqueeze(-1)
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, values, 1).rsqrt() * kept
    return root.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2)


def polar_factor(k: Tensor, tolerance: float) -> Tensor:
    """The polar factor of k (..., p, q): singular values above tolerance times the largest become 1, the others 0."""
    u, s, vt = torch.linalg.svd(k, full_matrices=False)
    kept = (s > tolerance * s[..., :1]).to(k.dtype)
    return (u * kept.unsqueeze(-2)) @ vt
